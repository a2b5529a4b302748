/// A piece of a prompt, and how much it counts.
struct Fragment: Equatable, Sendable {
    var text: String
    var weight = 1.0
}

/// Weighted prompts: "a (red:1.3) circle" draws the encoder's attention to "red".
///
/// Only an explicit number is a weight: "(text:1.3)", nested ones multiply. Every other bracket is text, so that a
/// prompt without weights means exactly what it means to diffusers. `\(` and `\)` are brackets in any case.
enum Prompt {
    static let mostWeight = 10.0

    /// The fragments of a prompt in order. Throws for a weight that cannot be used.
    static func fragments(_ prompt: String) throws -> [Fragment] {
        let scalars = Array(prompt.unicodeScalars)
        let marks = try Marks(scalars)
        var fragments: [Fragment] = []
        var weights = [1.0]
        var text = String.UnicodeScalarView()
        var position = 0
        func finish() {
            fragments.append(Fragment(text: String(text), weight: weights.last ?? 1))
            text = String.UnicodeScalarView()
        }
        while position < scalars.count {
            if Marks.isEscaped(scalars, position) {
                text.append(scalars[position + 1])
                position += 2
            } else if let weight = marks.openings[position] {
                finish()
                weights.append(try nested(weights.last ?? 1, weight))
                position += 1
            } else if let end = marks.ends[position] {
                finish()
                weights.removeLast()
                position = end
            } else {
                text.append(scalars[position])
                position += 1
            }
        }
        finish()
        let filled = fragments.filter { !$0.text.unicodeScalars.isEmpty }
        return filled.isEmpty ? [Fragment(text: "")] : filled
    }

    private static func nested(_ outer: Double, _ inner: Double) throws -> Double {
        guard outer * inner <= mostWeight else {
            throw DiffusionError.input("nested prompt weights come to \(outer * inner): expected at most \(mostWeight)")
        }
        return outer * inner
    }
}

/// Where the weighted brackets of a prompt open and end.
private struct Marks {
    /// The place of a weighted "(" and its weight.
    private(set) var openings: [Int: Double] = [:]
    /// The place of its ":" and the one after its ")".
    private(set) var ends: [Int: Int] = [:]

    init(_ scalars: [Unicode.Scalar]) throws {
        var stack: [Int] = []
        var position = 0
        while position < scalars.count {
            if Self.isEscaped(scalars, position) {
                position += 2
                continue
            }
            if scalars[position] == "(" {
                stack.append(position)
            } else if scalars[position] == ")" {
                _ = stack.popLast()
            } else if scalars[position] == ":", let opening = stack.last,
                let (digits, end) = Self.number(scalars, position + 1)
            {
                stack.removeLast()
                openings[opening] = try Self.weight(digits)
                ends[position] = end
                position = end
                continue
            }
            position += 1
        }
    }

    static func isEscaped(_ scalars: [Unicode.Scalar], _ position: Int) -> Bool {
        guard scalars[position] == "\\", position + 1 < scalars.count else { return false }
        return scalars[position + 1] == "(" || scalars[position + 1] == ")"
    }

    /// A number between optional spaces, then ")": its text and the place after the bracket.
    private static func number(_ scalars: [Unicode.Scalar], _ start: Int) -> (String, Int)? {
        var position = start
        func skipSpace() {
            while position < scalars.count, isSpace(scalars[position]) { position += 1 }
        }
        var text = ""
        func takeDigits() {
            while position < scalars.count, let digit = digit(scalars[position]) {
                text += String(digit)
                position += 1
            }
        }
        skipSpace()
        if position < scalars.count, scalars[position] == "+" || scalars[position] == "-" {
            text.unicodeScalars.append(scalars[position])
            position += 1
        }
        let sign = text
        takeDigits()
        if position < scalars.count, scalars[position] == "." {
            text += "."
            position += 1
            takeDigits()
        }
        // Digits are needed on one side of the point; Swift's numbers need them on both.
        let digits = text.dropFirst(sign.count)
        guard digits.contains(where: \.isNumber) else { return nil }
        let whole = (digits.hasPrefix(".") ? "0" : "") + digits + (digits.hasSuffix(".") ? "0" : "")
        skipSpace()
        guard position < scalars.count, scalars[position] == ")" else { return nil }
        return (sign + whole, position + 1)
    }

    private static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
    }

    private static func digit(_ scalar: Unicode.Scalar) -> Int? {
        guard scalar.properties.generalCategory == .decimalNumber else { return nil }
        return scalar.properties.numericValue.map { Int($0) }
    }

    private static func weight(_ text: String) throws -> Double {
        guard let value = Double(text), (0...Prompt.mostWeight).contains(value) else {
            throw DiffusionError.input(
                "prompt weight \(text): expected 0 to \(Prompt.mostWeight) (write \\( for a bracket that is no weight)")
        }
        return value
    }
}
