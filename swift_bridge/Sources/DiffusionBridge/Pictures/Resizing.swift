import Foundation

/// How the values between pixels are found.
enum Interpolation {
    case bicubic, lanczos

    var reach: Double { self == .bicubic ? 2 : 3 }

    func weight(_ distance: Double) -> Double {
        let x = abs(distance)
        guard x < reach else { return 0 }
        if self == .lanczos {
            guard x > 0 else { return 1 }
            return sin(.pi * x) / (.pi * x) * sin(.pi * x / 3) / (.pi * x / 3)
        }
        let a = -0.5
        return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : (((x - 5) * x + 8) * x - 4) * a
    }
}

extension Picture {
    /// The picture in another size, as Pillow resizes 8-bit pictures: first the rows, then the columns, with weights in
    /// fixed point and a byte between the two.
    func resized(_ newWidth: Int, _ newHeight: Int, _ interpolation: Interpolation) -> Picture {
        var wide = self
        if newWidth != width {
            let weights = Weights(from: width, to: newWidth, interpolation)
            var made = [UInt8](repeating: 0, count: 3 * newWidth * height)
            for row in 0..<height {
                for column in 0..<newWidth {
                    for channel in 0..<3 {
                        made[3 * (row * newWidth + column) + channel] = weights.value(column) {
                            bytes[3 * (row * width + $0) + channel]
                        }
                    }
                }
            }
            wide = Picture(unchecked: newWidth, height, made)
        }
        guard newHeight != height else { return wide }
        let weights = Weights(from: height, to: newHeight, interpolation)
        var made = [UInt8](repeating: 0, count: 3 * newWidth * newHeight)
        for row in 0..<newHeight {
            for place in 0..<3 * newWidth {
                made[row * 3 * newWidth + place] = weights.value(row) { wide.bytes[$0 * 3 * newWidth + place] }
            }
        }
        return Picture(unchecked: newWidth, newHeight, made)
    }
}

/// For each new pixel along one side, the old ones that it is made of and how much each counts.
private struct Weights {
    private static let precision = 22
    private var pixels: [(start: Int, factors: [Int])] = []

    init(from old: Int, to new: Int, _ interpolation: Interpolation) {
        let scale = Double(old) / Double(new)
        let widened = max(scale, 1)
        let reach = interpolation.reach * widened
        for index in 0..<new {
            let centre = (Double(index) + 0.5) * scale
            let start = max(Int(centre - reach + 0.5), 0)
            let end = min(Int(centre + reach + 0.5), old)
            let weights = (start..<end).map { interpolation.weight((Double($0) - centre + 0.5) / widened) }
            let sum = weights.reduce(0, +)
            let factors = weights.map { weight in
                let scaled = weight / sum * Double(1 << Self.precision)
                return Int(scaled < 0 ? scaled - 0.5 : scaled + 0.5)
            }
            pixels.append((start, factors))
        }
    }

    func value(_ index: Int, _ byte: (Int) -> UInt8) -> UInt8 {
        let (start, factors) = pixels[index]
        var sum = 1 << (Self.precision - 1)
        for (offset, factor) in factors.enumerated() { sum += factor * Int(byte(start + offset)) }
        return UInt8(min(max(sum >> Self.precision, 0), 255))
    }
}
