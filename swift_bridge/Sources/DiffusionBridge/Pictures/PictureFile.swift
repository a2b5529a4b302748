import Foundation

extension Picture {
    /// The picture in a file, turned upright; what is transparent keeps its colour. PNG files are read on every system,
    /// other kinds where the system has ImageIO. Throws a ``DiffusionError`` for what cannot be read.
    public init(contentsOf url: URL) throws {
        self = try Self.read(url, "picture") { $0.picture } other: { $0 }
    }

    /// A mask in a file, as greys: white marks what to paint anew. What is transparent marks nothing, whatever its
    /// colour.
    public init(maskAt url: URL) throws {
        self = try Self.read(url, "mask") { $0.mask } other: { $0.grey }
    }

    fileprivate static func read<Value>(
        _ url: URL, _ what: String, _ convert: (Raster) throws -> Value, other: (Picture) throws -> Value
    ) throws -> Value {
        let data: Data
        do {
            data = try Data(contentsOf: url)
        } catch {
            throw DiffusionError.input("\(what) \(url.path): cannot be read: \(reason(error))")
        }
        do {
            guard PNG.isOne(data) else { return try other(foreign(data)) }
            return try convert(Raster(png: Array(data)))
        } catch let error as DiffusionError {
            throw DiffusionError(error.kind, "\(what) \(url.path): \(error.message)")
        }
    }

    /// A mask's brightness in all three colours, by ITU-R 601-2 in fixed point as Pillow computes it.
    var grey: Picture {
        var greys: [UInt8] = []
        greys.reserveCapacity(bytes.count)
        for pixel in stride(from: 0, to: bytes.count, by: 3) {
            let value = brightness(bytes[pixel], bytes[pixel + 1], bytes[pixel + 2])
            greys += [value, value, value]
        }
        return Picture(unchecked: width, height, greys)
    }
}

/// How far away things are: larger is nearer, in any unit.
public struct DepthMap: Sendable, Equatable {
    /// In pixels.
    public let width: Int
    /// In pixels.
    public let height: Int
    /// One for each pixel, row by row from the top.
    public let values: [Float]

    /// Depths of `width * height` pixels. Throws for another number.
    public init(width: Int, height: Int, values: [Float]) throws {
        guard width > 0, height > 0, values.count == width * height else {
            throw DiffusionError.input("\(values.count) depths for \(width)x\(height) pixels: expected one a pixel")
        }
        (self.width, self.height, self.values) = (width, height, values)
    }

    /// The depths in a picture file, brighter is nearer; 16-bit greys keep their steps.
    public init(contentsOf url: URL) throws {
        self = try Picture.read(url, "depth") { try $0.depths } other: { picture in
            let values = stride(from: 0, to: picture.bytes.count, by: 3).map { place in
                thousandths(picture.bytes[place], picture.bytes[place + 1], picture.bytes[place + 2])
            }
            return try DepthMap(width: picture.width, height: picture.height, values: values)
        }
    }
}

private func brightness(_ red: UInt8, _ green: UInt8, _ blue: UInt8) -> UInt8 {
    let sum: Int = 19595 * Int(red) + 38470 * Int(green) + 7471 * Int(blue)
    return UInt8((sum + 0x8000) >> 16)
}

/// As Pillow turns colours into numbers that are not whole.
private func thousandths(_ red: UInt8, _ green: UInt8, _ blue: UInt8) -> Float {
    let sum: Int = 299 * Int(red) + 587 * Int(green) + 114 * Int(blue)
    return Float(sum) / 1000
}

extension Raster {
    /// Samples as bytes. Pillow takes the upper one of those with two, and the Python program rounds greys of two.
    private func byte(_ sample: UInt16) -> UInt8 {
        switch (kind, depth) {
        case (.grey, 16): UInt8((Float(sample) / 257).rounded(.toNearestOrEven))
        case (.palette, _), (_, 8): UInt8(truncatingIfNeeded: sample)
        case (_, 16): UInt8(sample >> 8)
        default: UInt8(Int(sample) * 255 / (1 << depth - 1))
        }
    }

    /// Red, green and blue of a pixel.
    private func colour(_ pixel: Int) -> (UInt8, UInt8, UInt8) {
        let place = pixel * kind.channels
        switch kind {
        case .grey, .greyAndAlpha:
            let value = byte(samples[place])
            return (value, value, value)
        case .palette:
            let entry = 3 * Int(samples[place])
            return (palette[entry], palette[entry + 1], palette[entry + 2])
        case .colour, .colourAndAlpha:
            return (byte(samples[place]), byte(samples[place + 1]), byte(samples[place + 2]))
        }
    }

    private func made(_ pixel: (Int) -> (UInt8, UInt8, UInt8)) -> Picture {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(3 * width * height)
        for index in 0..<width * height {
            let (red, green, blue) = pixel(index)
            bytes.append(red)
            bytes.append(green)
            bytes.append(blue)
        }
        let turned = Orientation.upright(bytes, width, height, channels: 3, orientation)
        return Picture(unchecked: turned.width, turned.height, turned.values)
    }

    var picture: Picture { made(colour) }

    /// Brightness times opacity.
    var mask: Picture {
        made { pixel in
            let (red, green, blue) = colour(pixel)
            var value = brightness(red, green, blue)
            if kind == .greyAndAlpha || kind == .colourAndAlpha {
                value = UInt8(Int(value) * Int(byte(samples[(pixel + 1) * kind.channels - 1])) / 255)
            }
            return (value, value, value)
        }
    }

    var depths: DepthMap {
        get throws {
            let values = (0..<width * height).map { pixel in
                if kind == .grey { return depth == 16 ? Float(samples[pixel]) : Float(byte(samples[pixel])) }
                let (red, green, blue) = colour(pixel)
                return kind == .greyAndAlpha ? Float(red) : thousandths(red, green, blue)
            }
            let turned = Orientation.upright(values, width, height, channels: 1, orientation)
            return try DepthMap(width: turned.width, height: turned.height, values: turned.values)
        }
    }
}
