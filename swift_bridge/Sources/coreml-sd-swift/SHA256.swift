/// SHA-256 (FIPS 180-4), by which a picture's record knows the files that went into it. Foundation has none on Linux.
enum SHA256 {
    private static let start: [UInt32] = fractions(8) { $0.squareRoot() }
    private static let rounds: [UInt32] = fractions(64) { number in
        // The double next to the cube root gives 32 bits of its fraction after one step of Newton's method.
        var root = 1.0
        for _ in 0..<60 { root -= (root * root * root - number) / (3 * root * root) }
        return root
    }

    /// The first 32 bits of the fractions of roots of the first primes.
    private static func fractions(_ count: Int, _ root: (Double) -> Double) -> [UInt32] {
        let primes = (2...311).filter { number in !(2..<number).contains { number % $0 == 0 } }
        return primes.prefix(count).map { prime in
            let value = root(Double(prime))
            return UInt32((value - value.rounded(.down)) * 0x1p32)
        }
    }

    /// The digest as lower-case digits.
    static func hex(_ bytes: [UInt8]) -> String {
        var state = start
        let length = UInt64(bytes.count) * 8
        var padded = bytes + [0x80]
        padded += [UInt8](repeating: 0, count: (120 - padded.count % 64) % 64)
        padded += (0..<8).reversed().map { UInt8(truncatingIfNeeded: length >> (8 * $0)) }
        for block in stride(from: 0, to: padded.count, by: 64) { add(padded[block..<block + 64], to: &state) }
        return state.map { word in
            let digits = String(word, radix: 16)
            return String(repeating: "0", count: 8 - digits.count) + digits
        }.joined()
    }

    private static func add(_ block: ArraySlice<UInt8>, to state: inout [UInt32]) {
        let turned = { (word: UInt32, bits: UInt32) in word >> bits | word << (32 - bits) }
        var words = stride(from: block.startIndex, to: block.endIndex, by: 4).map { place in
            block[place..<place + 4].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        }
        for index in 16..<64 {
            let (far, near) = (words[index - 15], words[index - 2])
            let first = turned(far, 7) ^ turned(far, 18) ^ far >> 3
            let second = turned(near, 17) ^ turned(near, 19) ^ near >> 10
            words.append(words[index - 16] &+ first &+ words[index - 7] &+ second)
        }
        var s = state
        for index in 0..<64 {
            let mixed = turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25)
            let choice = (s[4] & s[5]) ^ (~s[4] & s[6])
            let one = s[7] &+ mixed &+ choice &+ rounds[index] &+ words[index]
            let other = turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22)
            let majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2])
            s = [one &+ other &+ majority, s[0], s[1], s[2], s[3] &+ one, s[4], s[5], s[6]]
        }
        for index in 0..<8 { state[index] &+= s[index] }
    }
}
