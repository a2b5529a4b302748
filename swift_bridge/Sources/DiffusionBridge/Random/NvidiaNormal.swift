import Foundation

/// `torch.randn(…, device="cuda")` for tensors that a GPU fills with one value per thread: cuRAND's normal distribution
/// on Philox 4x32-10.
///
/// Value `i` of call `k` is the first of the four normals of counter `(k, 0, i, 0)` under the key `seed`.
struct NvidiaNormal: NormalSource {
    private let seed: UInt64
    private var calls: UInt32 = 0

    init(seed: UInt64) {
        self.seed = seed
    }

    mutating func normal(_ count: Int) -> [Float] {
        let call = calls
        calls &+= 1
        return (0..<count).map { index in
            let (first, second) = philox(call, UInt32(truncatingIfNeeded: index))
            return Self.boxMuller(first, second)
        }
    }

    /// Ten rounds of Philox 4x32: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
    private func philox(_ call: UInt32, _ index: UInt32) -> (UInt32, UInt32) {
        var (c0, c1, c2, c3): (UInt32, UInt32, UInt32, UInt32) = (call, 0, index, 0)
        var (k0, k1) = (UInt32(truncatingIfNeeded: seed), UInt32(seed >> 32))
        for _ in 0..<10 {
            let left = c0.multipliedFullWidth(by: 0xD251_1F53)
            let right = c2.multipliedFullWidth(by: 0xCD9E_8D57)
            (c0, c1, c2, c3) = (right.high ^ c1 ^ k0, right.low, left.high ^ c3 ^ k1, left.low)
            k0 &+= 0x9E37_79B9
            k1 &+= 0xBB67_AE85
        }
        return (c0, c1)
    }

    /// The sine half of Box and Muller's transform, with cuRAND's mapping of integers into (0, 1] and (0, 2 pi].
    private static func boxMuller(_ first: UInt32, _ second: UInt32) -> Float {
        let unit = 0x1p-32
        let radius = (-2 * log(Double(first) * unit + unit / 2)).squareRoot()
        let angle = (Double(second) * unit + unit / 2) * (2 * Double.pi)
        return Float(radius * sin(angle))
    }
}
