/// MT19937 (Matsumoto and Nishimura, 1998), seeded with one number as torch and NumPy seed it.
struct MersenneTwister {
    private static let size = 624
    private static let shift = 397
    private var state: [UInt32]
    private var index = MersenneTwister.size

    init(seed: UInt32) {
        state = [seed]
        state.reserveCapacity(Self.size)
        var previous = seed
        for number in 1..<UInt32(Self.size) {
            previous = 1_812_433_253 &* (previous ^ (previous >> 30)) &+ number
            state.append(previous)
        }
    }

    /// The next 32 random bits.
    mutating func next() -> UInt32 {
        if index == Self.size { renew() }
        var value = state[index]
        index += 1
        value ^= value >> 11
        value ^= (value << 7) & 0x9D2C_5680
        value ^= (value << 15) & 0xEFC6_0000
        return value ^ (value >> 18)
    }

    private mutating func renew() {
        for position in 0..<Self.size {
            let following = position + 1 == Self.size ? 0 : position + 1
            let opposite = position + Self.shift < Self.size ? position + Self.shift : position + Self.shift - Self.size
            let joined = (state[position] & 0x8000_0000) | (state[following] & 0x7FFF_FFFF)
            state[position] = state[opposite] ^ (joined >> 1) ^ (joined & 1 == 0 ? 0 : 0x9908_B0DF)
        }
        index = 0
    }
}
