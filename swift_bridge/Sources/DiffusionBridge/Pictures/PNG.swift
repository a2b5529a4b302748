import Foundation

/// PNG files (W3C, third edition): 8-bit colours out, and texts beside the pixels. ``Raster`` reads the pixels.
enum PNG {
    private static let signature: [UInt8] = [0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A]
    private static let mostText = 1 << 26

    /// A file with the texts as iTXt chunks, in order.
    static func encoded(_ picture: Picture, texts: [(String, String)] = []) -> [UInt8] {
        var file = signature
        let header = bigEndian(picture.width) + bigEndian(picture.height) + [8, 2, 0, 0, 0]
        append("IHDR", header, to: &file)
        for (key, text) in texts { append("iTXt", Array(key.utf8) + [0, 0, 0, 0, 0] + Array(text.utf8), to: &file) }
        append("IDAT", Deflate.compressed(filtered(picture)), to: &file)
        append("IEND", [], to: &file)
        return file
    }

    /// Each row as the difference to its left neighbours, which flat and smooth pictures compress well as.
    private static func filtered(_ picture: Picture) -> [UInt8] {
        let stride = 3 * picture.width
        var rows: [UInt8] = []
        rows.reserveCapacity((stride + 1) * picture.height)
        for start in Swift.stride(from: 0, to: picture.bytes.count, by: stride) {
            rows.append(1)
            for index in start..<start + stride {
                rows.append(picture.bytes[index] &- (index - start < 3 ? 0 : picture.bytes[index - 3]))
            }
        }
        return rows
    }

    private static func append(_ type: String, _ content: [UInt8], to file: inout [UInt8]) {
        let body = Array(type.utf8) + content
        file += bigEndian(content.count) + body + bigEndian(Int(checksum(body)))
    }

    private static func bigEndian(_ value: Int) -> [UInt8] {
        [24, 16, 8, 0].map { UInt8(truncatingIfNeeded: value >> $0) }
    }

    private static let table: [UInt32] = (0..<256).map { byte in
        (0..<8).reduce(UInt32(byte)) { value, _ in value & 1 == 1 ? 0xEDB8_8320 ^ (value >> 1) : value >> 1 }
    }

    private static func checksum(_ bytes: [UInt8]) -> UInt32 {
        ~bytes.reduce(~UInt32(0)) { table[Int(UInt8(truncatingIfNeeded: $0) ^ $1)] ^ ($0 >> 8) }
    }

    static func isOne(_ data: some Sequence<UInt8>) -> Bool { data.starts(with: signature) }

    /// The chunks of a file: type and content. Throws where it is no PNG, cut or damaged.
    static func chunks(_ file: [UInt8]) throws -> [(type: String, content: [UInt8])] {
        guard file.starts(with: signature) else { throw DiffusionError.input("not a PNG file") }
        var chunks: [(String, [UInt8])] = []
        var position = signature.count
        while chunks.last?.0 != "IEND" {
            guard position + 12 <= file.count else { throw DiffusionError.input("the PNG file is cut") }
            let size = number(file, position)
            let end = position + 8 + size
            guard size >= 0, end + 4 <= file.count else { throw DiffusionError.input("the PNG file is cut") }
            let body = Array(file[position + 4..<end])
            guard checksum(body) == UInt32(number(file, end)) else {
                throw DiffusionError.input("the PNG file is damaged")
            }
            chunks.append((String(decoding: body.prefix(4), as: UTF8.self), Array(body.dropFirst(4))))
            position = end + 4
        }
        return chunks
    }

    static func number(_ bytes: [UInt8], _ position: Int) -> Int {
        bytes[position..<position + 4].reduce(0) { $0 << 8 | Int($1) }
    }

    /// The texts beside the pixels, by key; of a key that comes twice, the last.
    static func texts(_ file: [UInt8]) throws -> [String: String] {
        var texts: [String: String] = [:]
        for (type, content) in try chunks(file) {
            let parts = content.split(separator: 0, maxSplits: 1, omittingEmptySubsequences: false)
            guard parts.count == 2 else { continue }
            let (key, rest) = (String(decoding: parts[0], as: UTF8.self), Array(parts[1]))
            switch type {
            case "tEXt": texts[key] = latin1(rest)
            case "zTXt": texts[key] = latin1(try Inflate.bytes(of: Array(rest.dropFirst()), limit: mostText))
            case "iTXt":
                // Whether it is compressed, how, the language, the translated key, the text.
                let fields = rest.dropFirst(2).split(separator: 0, maxSplits: 2, omittingEmptySubsequences: false)
                guard rest.count > 2, fields.count == 3 else { continue }
                let text = rest[0] == 0 ? Array(fields[2]) : try Inflate.bytes(of: Array(fields[2]), limit: mostText)
                texts[key] = String(decoding: text, as: UTF8.self)
            default: continue
            }
        }
        return texts
    }

    private static func latin1(_ bytes: [UInt8]) -> String {
        String(String.UnicodeScalarView(bytes.map { Unicode.Scalar($0) }))
    }
}
