import Foundation

/// `numpy.random.RandomState(seed).randn`: Marsaglia's polar method in double precision.
struct NumPyNormal: NormalSource {
    private var generator: MersenneTwister
    private var kept: Double?

    init(seed: UInt32) {
        generator = MersenneTwister(seed: seed)
    }

    mutating func normal(_ count: Int) -> [Float] {
        (0..<count).map { _ in Float(one()) }
    }

    private mutating func uniform() -> Double {
        let high = Double(generator.next() >> 5)
        let low = Double(generator.next() >> 6)
        return (high * 67_108_864 + low) / 9_007_199_254_740_992
    }

    private mutating func one() -> Double {
        if let value = kept {
            kept = nil
            return value
        }
        while true {
            let first = 2 * uniform() - 1
            let second = 2 * uniform() - 1
            let square = first * first + second * second
            if square < 1 && square != 0 {
                let factor = (-2 * log(square) / square).squareRoot()
                kept = factor * first
                return factor * second
            }
        }
    }
}
