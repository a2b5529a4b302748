/// The pixels of a PNG file as they stand in it: every colour type, bit depth and interlacing.
struct Raster {
    enum Kind: UInt8 {
        case grey = 0
        case colour = 2
        case palette = 3
        case greyAndAlpha = 4
        case colourAndAlpha = 6

        var channels: Int {
            switch self {
            case .grey, .palette: 1
            case .greyAndAlpha: 2
            case .colour: 3
            case .colourAndAlpha: 4
            }
        }

        var depths: Set<Int> {
            switch self {
            case .grey: [1, 2, 4, 8, 16]
            case .palette: [1, 2, 4, 8]
            default: [8, 16]
            }
        }
    }

    /// Larger than what phones and scanners make; as the Python program.
    static let mostPixels = 100_000_000
    let width: Int
    let height: Int
    let kind: Kind
    /// Bits of a sample.
    let depth: Int
    /// Row by row from the top, the channels of a pixel side by side.
    private(set) var samples: [UInt16]
    /// Three bytes for each colour.
    let palette: [UInt8]
    /// How the picture is to be turned, 1 to 8 as EXIF counts.
    let orientation: Int

    /// Throws for what is no PNG file, cut, damaged, or too large.
    init(png file: [UInt8]) throws {
        let chunks = try PNG.chunks(file)
        guard let header = chunks.first, header.type == "IHDR", header.content.count == 13 else {
            throw DiffusionError.input("the PNG file has no header")
        }
        let content = header.content
        (width, height, depth) = (PNG.number(content, 0), PNG.number(content, 4), Int(content[8]))
        guard let kind = Kind(rawValue: content[9]), kind.depths.contains(depth), content[10] == 0, content[11] == 0,
            content[12] < 2, width > 0, height > 0
        else { throw DiffusionError.input("the PNG file's header makes no sense") }
        guard width <= Self.mostPixels / height else {
            throw DiffusionError.input(
                "\(width)x\(height) pixels: expected at most \(Self.mostPixels / 1_000_000) million")
        }
        self.kind = kind
        palette = chunks.first { $0.type == "PLTE" }?.content ?? []
        orientation = chunks.first { $0.type == "eXIf" }.flatMap { Orientation.read($0.content) } ?? 1
        samples = [UInt16](repeating: 0, count: width * height * kind.channels)
        let passes = content[12] == 1 ? Pass.adam7 : [Pass(left: 0, top: 0, right: 1, down: 1)]
        let sizes = passes.map { $0.size(width, height) }
        let bits = kind.channels * depth
        let total = sizes.reduce(0) { $0 + ($1.width > 0 ? $1.height * (1 + ($1.width * bits + 7) / 8) : 0) }
        let data = try Inflate.bytes(of: chunks.filter { $0.type == "IDAT" }.flatMap(\.content), limit: total)
        guard data.count == total else { throw DiffusionError.input("the PNG file's pixels are cut") }
        var position = 0
        for (pass, size) in zip(passes, sizes) where size.width > 0 {
            position = try read(data, position, pass, size)
        }
        guard kind != .palette || samples.allSatisfy({ 3 * Int($0) + 2 < palette.count }) else {
            throw DiffusionError.input("the PNG file's palette lacks a colour that is used")
        }
    }

    /// One pass of the rows; returns where the next begins.
    private mutating func read(
        _ data: [UInt8], _ start: Int, _ pass: Pass, _ size: (width: Int, height: Int)
    ) throws -> Int {
        let channels = kind.channels
        let length = (size.width * channels * depth + 7) / 8
        let pixel = max(channels * depth / 8, 1)
        var above = [UInt8](repeating: 0, count: length)
        var position = start
        for row in 0..<size.height {
            var bytes = Array(data[position + 1..<position + 1 + length])
            try Self.unfilter(data[position], &bytes, above, pixel)
            let line = (pass.top + row * pass.down) * width
            for column in 0..<size.width {
                let place = (line + pass.left + column * pass.right) * channels
                for channel in 0..<channels {
                    samples[place + channel] = Self.sample(bytes, column * channels + channel, depth)
                }
            }
            above = bytes
            position += 1 + length
        }
        return position
    }

    private static func sample(_ bytes: [UInt8], _ index: Int, _ depth: Int) -> UInt16 {
        switch depth {
        case 8: return UInt16(bytes[index])
        case 16: return UInt16(bytes[2 * index]) << 8 | UInt16(bytes[2 * index + 1])
        default:
            let bit = index * depth
            return UInt16(bytes[bit / 8] >> (8 - depth - bit % 8)) & (1 << depth - 1)
        }
    }

    /// PNG, section 9: each byte is the difference to a guess from the left, from above, or from both.
    private static func unfilter(_ type: UInt8, _ bytes: inout [UInt8], _ above: [UInt8], _ pixel: Int) throws {
        let left = { (bytes: [UInt8], index: Int) in index < pixel ? 0 : bytes[index - pixel] }
        switch type {
        case 0: return
        case 1: for index in bytes.indices.dropFirst(pixel) { bytes[index] &+= bytes[index - pixel] }
        case 2: for index in bytes.indices { bytes[index] &+= above[index] }
        case 3:
            for index in bytes.indices {
                bytes[index] &+= UInt8((Int(index < pixel ? 0 : bytes[index - pixel]) + Int(above[index])) / 2)
            }
        case 4:
            for index in bytes.indices {
                let a = Int(index < pixel ? 0 : bytes[index - pixel])
                let (b, c) = (Int(above[index]), Int(left(above, index)))
                let (toA, toB, toC) = (abs(b - c), abs(a - c), abs(a + b - 2 * c))
                bytes[index] &+= UInt8(toA <= toB && toA <= toC ? a : toB <= toC ? b : c)
            }
        default: throw DiffusionError.input("the PNG file is damaged")
        }
    }

    /// The pixels that one pass of an interlaced picture holds.
    private struct Pass {
        let left: Int
        let top: Int
        let right: Int
        let down: Int

        static let adam7 = [
            Pass(left: 0, top: 0, right: 8, down: 8), Pass(left: 4, top: 0, right: 8, down: 8),
            Pass(left: 0, top: 4, right: 4, down: 8), Pass(left: 2, top: 0, right: 4, down: 4),
            Pass(left: 0, top: 2, right: 2, down: 4), Pass(left: 1, top: 0, right: 2, down: 2),
            Pass(left: 0, top: 1, right: 1, down: 2),
        ]

        func size(_ width: Int, _ height: Int) -> (width: Int, height: Int) {
            (max(width - left + right - 1, 0) / right, max(height - top + down - 1, 0) / down)
        }
    }
}
