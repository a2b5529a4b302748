/// The compression of PNG files (RFC 1950 and 1951). Foundation has none on Linux.
enum Deflate {
    private static let window = 32_768
    private static let longest = 258
    private static let shortest = 3
    static let lengthBases = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258]
    static let lengthBits = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0]
    static let distanceBases = [1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577]
    static let distanceBits = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13]

    /// A zlib stream with one block of fixed codes: repetitions that the last place of the same three bytes shows.
    static func compressed(_ bytes: [UInt8]) -> [UInt8] {
        var writer = BitWriter(bytes: [0x78, 0x01])
        writer.write(1, 1)
        writer.write(1, 2)
        var lastPlaces = [Int](repeating: -1, count: 1 << 15)
        var position = 0
        while position < bytes.count {
            var length = 0
            var distance = 0
            if position + shortest <= bytes.count {
                let three = Int(bytes[position]) << 16 | Int(bytes[position + 1]) << 8 | Int(bytes[position + 2])
                let slot = (three &* 0x9E37_79B1) >> 10 & 0x7FFF
                let place = lastPlaces[slot]
                lastPlaces[slot] = position
                if place >= 0, position - place <= window {
                    distance = position - place
                    let most = min(longest, bytes.count - position)
                    while length < most, bytes[place + length] == bytes[position + length] { length += 1 }
                }
            }
            if length >= shortest {
                writer.writeRepetition(length, distance)
                position += length
            } else {
                writer.writeFixed(Int(bytes[position]))
                position += 1
            }
        }
        writer.writeFixed(256)
        writer.finish()
        let sum = adler(bytes)
        return writer.bytes + [24, 16, 8, 0].map { UInt8(truncatingIfNeeded: sum >> $0) }
    }

    static func adler(_ bytes: [UInt8]) -> UInt32 {
        var (low, high): (UInt32, UInt32) = (1, 0)
        for byte in bytes {
            low = (low + UInt32(byte)) % 65_521
            high = (high + low) % 65_521
        }
        return high << 16 | low
    }
}

private struct BitWriter {
    var bytes: [UInt8]
    private var buffer: UInt32 = 0
    private var count: UInt32 = 0

    init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    mutating func write(_ value: Int, _ bits: Int) {
        buffer |= UInt32(value) << count
        count += UInt32(bits)
        while count >= 8 {
            bytes.append(UInt8(truncatingIfNeeded: buffer))
            buffer >>= 8
            count -= 8
        }
    }

    mutating func finish() {
        if count > 0 { write(0, 8 - Int(count)) }
    }

    /// Huffman codes are written with their highest bit first.
    private mutating func writeCode(_ code: Int, _ bits: Int) {
        var turned = 0
        for bit in 0..<bits where code >> bit & 1 == 1 { turned |= 1 << (bits - 1 - bit) }
        write(turned, bits)
    }

    mutating func writeFixed(_ symbol: Int) {
        switch symbol {
        case ..<144: writeCode(0x30 + symbol, 8)
        case ..<256: writeCode(0x190 + symbol - 144, 9)
        case ..<280: writeCode(symbol - 256, 7)
        default: writeCode(0xC0 + symbol - 280, 8)
        }
    }

    mutating func writeRepetition(_ length: Int, _ distance: Int) {
        let lengthCode = Deflate.lengthBases.lastIndex { $0 <= length } ?? 0
        writeFixed(257 + lengthCode)
        write(length - Deflate.lengthBases[lengthCode], Deflate.lengthBits[lengthCode])
        let distanceCode = Deflate.distanceBases.lastIndex { $0 <= distance } ?? 0
        writeCode(distanceCode, 5)
        write(distance - Deflate.distanceBases[distanceCode], Deflate.distanceBits[distanceCode])
    }
}
