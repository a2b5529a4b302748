/// Reads zlib streams. Throws for damaged ones, and where more than `limit` bytes come out.
struct Inflate {
    private let bytes: [UInt8]
    private let limit: Int
    private var position = 2
    private var buffer = 0
    private var count = 0
    private var output: [UInt8] = []

    static func bytes(of stream: [UInt8], limit: Int) throws -> [UInt8] {
        var inflate = Inflate(bytes: stream, limit: limit)
        return try inflate.run()
    }

    private init(bytes: [UInt8], limit: Int) {
        self.bytes = bytes
        self.limit = limit
    }

    private static let damage = DiffusionError.input("the compressed data are damaged")

    private mutating func run() throws -> [UInt8] {
        guard bytes.count > 2, bytes[0] & 0x0F == 8, bytes[1] & 0x20 == 0,
            (Int(bytes[0]) << 8 | Int(bytes[1])) % 31 == 0
        else { throw Self.damage }
        var isLast = false
        while !isLast {
            isLast = try take(1) == 1
            switch try take(2) {
            case 0: try stored()
            case 1: try block(Self.fixedLiterals, Self.fixedDistances)
            case 2: try dynamic()
            default: throw Self.damage
            }
        }
        position -= count / 8
        guard position + 4 <= bytes.count else { throw Self.damage }
        let sum = bytes[position..<position + 4].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        guard sum == Deflate.adler(output) else { throw Self.damage }
        return output
    }

    private mutating func take(_ bits: Int) throws -> Int {
        while count < bits {
            guard position < bytes.count else { throw Self.damage }
            buffer |= Int(bytes[position]) << count
            position += 1
            count += 8
        }
        defer {
            buffer >>= bits
            count -= bits
        }
        return buffer & ((1 << bits) - 1)
    }

    private mutating func append(_ byte: UInt8) throws {
        guard output.count < limit else { throw DiffusionError.input("the compressed data are larger than they say") }
        output.append(byte)
    }

    private mutating func stored() throws {
        position -= count / 8
        (buffer, count) = (0, 0)
        guard position + 4 <= bytes.count else { throw Self.damage }
        let size = Int(bytes[position]) | Int(bytes[position + 1]) << 8
        position += 4
        guard position + size <= bytes.count else { throw Self.damage }
        for byte in bytes[position..<position + size] { try append(byte) }
        position += size
    }

    private mutating func dynamic() throws {
        let literals = try take(5) + 257
        let distances = try take(5) + 1
        var lengths = [Int](repeating: 0, count: 19)
        let order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]
        for index in 0..<(try take(4) + 4) { lengths[order[index]] = try take(3) }
        let codes = Codes(lengths)
        var all: [Int] = []
        while all.count < literals + distances {
            switch try symbol(codes) {
            case let length where length < 16: all.append(length)
            case 16:
                guard let last = all.last else { throw Self.damage }
                all += [Int](repeating: last, count: try take(2) + 3)
            case 17: all += [Int](repeating: 0, count: try take(3) + 3)
            default: all += [Int](repeating: 0, count: try take(7) + 11)
            }
        }
        guard all.count == literals + distances else { throw Self.damage }
        try block(Codes(Array(all[..<literals])), Codes(Array(all[literals...])))
    }

    private mutating func block(_ literals: Codes, _ distances: Codes) throws {
        while true {
            let symbol = try symbol(literals)
            if symbol == 256 { return }
            if symbol < 256 {
                try append(UInt8(symbol))
                continue
            }
            guard symbol - 257 < Deflate.lengthBases.count else { throw Self.damage }
            let length = try Deflate.lengthBases[symbol - 257] + take(Deflate.lengthBits[symbol - 257])
            let code = try self.symbol(distances)
            guard code < Deflate.distanceBases.count else { throw Self.damage }
            let distance = try Deflate.distanceBases[code] + take(Deflate.distanceBits[code])
            guard distance <= output.count else { throw Self.damage }
            for _ in 0..<length { try append(output[output.count - distance]) }
        }
    }

    private mutating func symbol(_ codes: Codes) throws -> Int {
        while count < Codes.quickBits, position < bytes.count {
            buffer |= Int(bytes[position]) << count
            position += 1
            count += 8
        }
        let entry = codes.quick[buffer & (1 << Codes.quickBits - 1)]
        if entry.length > 0, entry.length <= count {
            buffer >>= entry.length
            count -= entry.length
            return entry.symbol
        }
        var (code, first, index) = (0, 0, 0)
        for length in 1..<codes.counts.count {
            code |= try take(1)
            let number = codes.counts[length]
            if code - first < number { return codes.symbols[index + code - first] }
            index += number
            first = (first + number) << 1
            code <<= 1
        }
        throw Self.damage
    }

    /// Canonical Huffman codes: how many there are of each length, and the symbols in their order.
    private struct Codes {
        static let quickBits = 9
        var counts = [Int](repeating: 0, count: 16)
        let symbols: [Int]
        /// For the next bits of a stream, the symbol whose code they begin with; length 0 where it is a longer one.
        private(set) var quick = [(symbol: Int, length: Int)](repeating: (0, 0), count: 1 << quickBits)

        init(_ lengths: [Int]) {
            for length in lengths where length > 0 { counts[length] += 1 }
            symbols = (1..<16).flatMap { length in lengths.indices.filter { lengths[$0] == length } }
            var (code, index) = (0, 0)
            for length in 1...Self.quickBits {
                for symbol in symbols[index..<index + counts[length]] {
                    // Codes stand in the stream with their highest bit first; damaged lengths may give too many.
                    let turned = (0..<length).reduce(0) { $0 | (code >> $1 & 1) << (length - 1 - $1) }
                    let places = stride(from: turned, to: 1 << Self.quickBits, by: 1 << length)
                    if code < 1 << length { for place in places { quick[place] = (symbol, length) } }
                    code += 1
                }
                index += counts[length]
                code <<= 1
            }
        }
    }

    private static let fixedLiterals = Codes(
        (0..<288).map { $0 < 144 ? 8 : $0 < 256 ? 9 : $0 < 280 ? 7 : 8 })
    private static let fixedDistances = Codes([Int](repeating: 5, count: 30))
}
