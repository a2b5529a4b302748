import Foundation

/// A JSON value. Numbers may be NaN and Infinity, which Python writes into scheduler configurations and
/// Foundation's parsers refuse.
indirect enum JSON: Sendable, Equatable {
    case null
    case bool(Bool)
    case integer(Int)
    /// A whole number beyond `Int`: a seed.
    case unsigned(UInt64)
    case number(Double)
    case string(String)
    case array([JSON])
    case object([String: JSON])

    subscript(key: String) -> JSON? {
        if case .object(let members) = self { members[key] } else { nil }
    }

    var isNull: Bool { self == .null }
    var bool: Bool? { if case .bool(let value) = self { value } else { nil } }
    var integer: Int? { if case .integer(let value) = self { value } else { nil } }
    var string: String? { if case .string(let value) = self { value } else { nil } }
    var array: [JSON]? { if case .array(let value) = self { value } else { nil } }
    var object: [String: JSON]? { if case .object(let value) = self { value } else { nil } }

    /// A number, whole or not.
    var number: Double? {
        switch self {
        case .integer(let value): Double(value)
        case .unsigned(let value): Double(value)
        case .number(let value): value
        default: nil
        }
    }

    /// The value as compact JSON text.
    var text: String {
        switch self {
        case .null: "null"
        case .bool(let value): value ? "true" : "false"
        case .integer(let value): String(value)
        case .unsigned(let value): String(value)
        case .number(let value):
            value.isNaN ? "NaN" : value.isInfinite ? (value < 0 ? "-Infinity" : "Infinity") : String(value)
        case .string(let value): JSON.quoted(value)
        case .array(let values): "[" + values.map(\.text).joined(separator: ", ") + "]"
        case .object(let members):
            JSON.text(of: members.sorted { $0.key < $1.key }.map { ($0.key, $0.value) })
        }
    }

    /// An object's text with its members in the order given.
    static func text(of members: [(String, JSON)]) -> String {
        "{" + members.map { "\(quoted($0.0)): \($0.1.text)" }.joined(separator: ", ") + "}"
    }

    private static func quoted(_ text: String) -> String {
        var result = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": result += "\\\""
            case "\\": result += "\\\\"
            case "\n": result += "\\n"
            case "\r": result += "\\r"
            case "\t": result += "\\t"
            case _ where scalar.value < 0x20:
                let digits = String(scalar.value, radix: 16)
                result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result + "\""
    }
}

extension JSON {
    /// A value of JSON text in UTF-8. Throws an error that says where the text is damaged.
    init(parsing data: some Sequence<UInt8>) throws {
        var parser = JSONParser(bytes: Array(data))
        self = try parser.document()
    }

    /// The value in a file. Throws an error that names the file.
    init(contentsOf url: URL) throws {
        do {
            try self.init(parsing: Data(contentsOf: url))
        } catch let error as DiffusionError {
            throw DiffusionError.package("\(url.path): cannot be read as JSON: \(error.message)")
        } catch {
            throw DiffusionError.package("\(url.path): cannot be read: \(reason(error))")
        }
    }
}

private struct JSONParser {
    private static let maximumDepth = 200
    let bytes: [UInt8]
    var position = 0
    var depth = 0

    init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    mutating func document() throws -> JSON {
        if bytes.starts(with: [0xEF, 0xBB, 0xBF]) { position = 3 }
        let result = try value()
        skipSpace()
        guard position == bytes.count else { throw damage("text after the end") }
        return result
    }

    private func damage(_ what: String) -> DiffusionError {
        DiffusionError.package("\(what) at byte \(position)")
    }

    private mutating func skipSpace() {
        while position < bytes.count, [0x20, 0x0A, 0x0D, 0x09].contains(bytes[position]) { position += 1 }
    }

    private mutating func take(_ character: Unicode.Scalar) -> Bool {
        skipSpace()
        guard position < bytes.count, UInt32(bytes[position]) == character.value else { return false }
        position += 1
        return true
    }

    private mutating func value() throws -> JSON {
        skipSpace()
        guard position < bytes.count else { throw damage("the text ends too early") }
        depth += 1
        defer { depth -= 1 }
        guard depth <= Self.maximumDepth else { throw damage("too many values within values") }
        switch bytes[position] {
        case UInt8(ascii: "{"): return try object()
        case UInt8(ascii: "["): return try array()
        case UInt8(ascii: "\""): return .string(try string())
        default: return try word()
        }
    }

    private mutating func object() throws -> JSON {
        position += 1
        var members: [String: JSON] = [:]
        if take("}") { return .object(members) }
        repeat {
            skipSpace()
            guard position < bytes.count, bytes[position] == UInt8(ascii: "\"") else { throw damage("no name") }
            let key = try string()
            guard take(":") else { throw damage("no colon") }
            members[key] = try value()
        } while take(",")
        guard take("}") else { throw damage("no closing brace") }
        return .object(members)
    }

    private mutating func array() throws -> JSON {
        position += 1
        var values: [JSON] = []
        if take("]") { return .array(values) }
        repeat { values.append(try value()) } while take(",")
        guard take("]") else { throw damage("no closing bracket") }
        return .array(values)
    }

    private mutating func word() throws -> JSON {
        let start = position
        while position < bytes.count, !",]} \n\r\t:".utf8.contains(bytes[position]) { position += 1 }
        let text = String(decoding: bytes[start..<position], as: UTF8.self)
        switch text {
        case "null": return .null
        case "true": return .bool(true)
        case "false": return .bool(false)
        case "NaN": return .number(.nan)
        case "Infinity": return .number(.infinity)
        case "-Infinity": return .number(-.infinity)
        default: break
        }
        let isPlain = text.utf8.allSatisfy { "0123456789+-.eE".utf8.contains($0) }
        if isPlain, let whole = Int(text) { return .integer(whole) }
        if isPlain, let whole = UInt64(text) { return .unsigned(whole) }
        guard isPlain, let number = Double(text) else {
            position = start
            throw damage("no JSON value")
        }
        return .number(number)
    }

    private mutating func string() throws -> String {
        position += 1
        var content: [UInt8] = []
        while position < bytes.count {
            let byte = bytes[position]
            position += 1
            switch byte {
            case UInt8(ascii: "\""):
                guard let text = String(validating: content, as: UTF8.self) else { throw damage("no UTF-8") }
                return text
            case UInt8(ascii: "\\"): content += Array(String(try escape()).utf8)
            default: content.append(byte)
            }
        }
        throw damage("a string without end")
    }

    private mutating func escape() throws -> Unicode.Scalar {
        guard position < bytes.count else { throw damage("a string without end") }
        let byte = bytes[position]
        position += 1
        switch byte {
        case UInt8(ascii: "n"): return "\n"
        case UInt8(ascii: "t"): return "\t"
        case UInt8(ascii: "r"): return "\r"
        case UInt8(ascii: "b"): return "\u{8}"
        case UInt8(ascii: "f"): return "\u{c}"
        case UInt8(ascii: "u"): return try unicodeEscape()
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return Unicode.Scalar(byte)
        default: throw damage("an unknown escape")
        }
    }

    /// `\uXXXX`, two of them for what lies beyond the first 65,536 characters.
    private mutating func unicodeEscape() throws -> Unicode.Scalar {
        let first = try fourDigits()
        if let scalar = Unicode.Scalar(first) { return scalar }
        guard first < 0xDC00, bytes[position...].starts(with: [UInt8(ascii: "\\"), UInt8(ascii: "u")]) else {
            throw damage("half a character")
        }
        position += 2
        let second = try fourDigits()
        guard (0xDC00..<0xE000).contains(second),
            let scalar = Unicode.Scalar(0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00))
        else { throw damage("half a character") }
        return scalar
    }

    private mutating func fourDigits() throws -> UInt32 {
        let digits = String(decoding: bytes[position..<min(position + 4, bytes.count)], as: UTF8.self)
        guard digits.utf8.count == 4, digits.allSatisfy(\.isHexDigit), let value = UInt32(digits, radix: 16) else {
            throw damage("an unknown escape")
        }
        position += 4
        return value
    }
}

/// Foundation's reason for an error in one line.
func reason(_ error: any Error) -> String {
    if let own = error as? DiffusionError { return own.message }
    let text = (error as NSError).localizedDescription
    return text.split(whereSeparator: \.isNewline).first.map(String.init) ?? "\(type(of: error))"
}
