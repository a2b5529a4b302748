/// A picture of 8-bit red, green and blue values, row by row from the top.
public struct Picture: Sendable, Equatable {
    /// In pixels.
    public let width: Int
    /// In pixels.
    public let height: Int
    /// Three for each pixel.
    public let bytes: [UInt8]

    /// A picture of `3 * width * height` bytes. Throws for another number.
    public init(width: Int, height: Int, bytes: [UInt8]) throws {
        guard width > 0, height > 0, bytes.count == 3 * width * height else {
            throw DiffusionError.input("\(bytes.count) bytes for a picture of \(width)x\(height): expected 3 a pixel")
        }
        self.init(unchecked: width, height, bytes)
    }

    init(unchecked width: Int, _ height: Int, _ bytes: [UInt8]) {
        (self.width, self.height, self.bytes) = (width, height, bytes)
    }

    /// From what a decoder gives: one row of (1, 3, height, width) in about -1..1.
    init(decoded tensor: Tensor) {
        let (height, width) = (tensor.shape[2], tensor.shape[3])
        let size = width * height
        var bytes = [UInt8](repeating: 0, count: 3 * size)
        for channel in 0..<3 {
            for index in 0..<size {
                let value = min(max(tensor.values[channel * size + index] / 2 + 0.5, 0), 1)
                bytes[3 * index + channel] = UInt8((value * 255).rounded(.toNearestOrEven))
            }
        }
        self.init(unchecked: width, height, bytes)
    }

    static func black(_ width: Int, _ height: Int) -> Picture {
        Picture(unchecked: width, height, [UInt8](repeating: 0, count: 3 * width * height))
    }
}
