import Foundation

/// `torch.randn` of float32 values on the CPU, bit for bit as on x86 with AVX2.
///
/// 16 values or more are made in blocks of 16 by Box and Muller's transform in float32; where their number is no
/// multiple of 16, the last 16 are drawn anew. Fewer than 16 are made one by one in double precision, and the second
/// value of a pair is kept for the next call.
struct TorchNormal: NormalSource {
    private static let block = 16
    private var generator: MersenneTwister
    private var kept: Double?

    init(seed: UInt32) {
        generator = MersenneTwister(seed: seed)
    }

    mutating func normal(_ count: Int) -> [Float] {
        guard count >= Self.block else { return (0..<count).map { _ in Float(one()) } }
        var values = (0..<count).map { _ in uniform() }
        for start in stride(from: 0, through: count - Self.block, by: Self.block) {
            Self.transform(&values, start)
        }
        if count % Self.block != 0 {
            let start = count - Self.block
            for index in start..<count { values[index] = uniform() }
            Self.transform(&values, start)
        }
        return values
    }

    /// 24 random bits in [0, 1).
    private mutating func uniform() -> Float {
        Float(generator.next() & 0xFF_FFFF) * 0x1p-24
    }

    private mutating func uniformDouble() -> Double {
        let high = UInt64(generator.next())
        let low = UInt64(generator.next())
        return Double(((high << 32) | low) & ((1 << 53) - 1)) * 0x1p-53
    }

    private mutating func one() -> Double {
        if let value = kept {
            kept = nil
            return value
        }
        let angle = 2 * Double.pi * uniformDouble()
        let radius = (-2 * log1p(-uniformDouble())).squareRoot()
        kept = radius * sin(angle)
        return radius * cos(angle)
    }

    /// Eight pairs: the first eight values and the last eight of a block.
    private static func transform(_ values: inout [Float], _ start: Int) {
        let half = block / 2
        for index in start..<start + half {
            let radius = (-2 * Cephes.log(1 - values[index])).squareRoot()
            let (sine, cosine) = Cephes.sineAndCosine(Float(2 * Double.pi) * values[index + half])
            values[index] = radius * cosine
            values[index + half] = radius * sine
        }
    }
}

/// The single precision functions of Moshier's Cephes library in the arrangement that torch's AVX2 code has, products
/// and sums fused where its compiler fuses them. Only so are the last bits those of torch.
private enum Cephes {
    /// The natural logarithm of a number in (0, 1].
    static func log(_ number: Float) -> Float {
        let bits = max(number, Float.leastNormalMagnitude).bitPattern
        var exponent = Float(Int32(bits >> 23) - 126)
        var x = Float(bitPattern: (bits & 0x807F_FFFF) | 0x3F00_0000)
        let isSmall = x < 0.707106781186547524
        let added: Float = isSmall ? x : 0
        x = (x - 1) + added
        if isSmall { exponent -= 1 }
        var y: Float = 7.0376836292e-2
        for coefficient: Float in [
            -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
            -2.4999993993e-1, 3.3333331174e-1,
        ] {
            y = fused(y, x, coefficient)
        }
        let square = x * x
        y = fused(y * x, square, exponent * -2.12194440e-4)
        y = fused(square, -0.5, y)
        return fused(exponent, 0.693359375, x + y)
    }

    /// Of an angle in [0, 2 pi].
    static func sineAndCosine(_ angle: Float) -> (Float, Float) {
        let octant = (Int32(angle * 1.27323954473516) + 1) & ~1
        let whole = Float(octant)
        var x = fused(whole, -0.78515625, angle)
        x = fused(whole, -2.4187564849853515625e-4, x)
        x = fused(whole, -3.77489497744594108e-8, x)
        let square = x * x
        var even = fused(2.443315711809948e-5, square, -1.388731625493765e-3)
        even = fused(even, square, 4.166664568298827e-2)
        even = fused(even * square, square, square * -0.5) + 1
        var odd = fused(-1.9515295891e-4, square, 8.3321608736e-3)
        odd = fused(odd, square, -1.6666654611e-1)
        odd = fused(odd * square, x, x)
        let isOdd = octant & 2 == 0
        let sine = isOdd ? odd : even
        let cosine = isOdd ? even : odd
        return (octant & 4 == 0 ? sine : -sine, (octant - 2) & 4 == 0 ? -cosine : cosine)
    }

    private static func fused(_ factor: Float, _ other: Float, _ term: Float) -> Float {
        term.addingProduct(factor, other)
    }
}
