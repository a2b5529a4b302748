import Foundation

/// Splits text into the words that CLIP's byte pairs are made within:
/// contractions, runs of letters, single digits and runs of anything else, of the composed lower-case text.
enum WordSplitter {
    private static let contractions = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].map { Array($0.unicodeScalars) }
    private static let marks = ["<|startoftext|>", "<|endoftext|>"].map { Array($0.unicodeScalars) }

    static func words(_ text: String) -> [String] {
        let scalars = lowercased(text.precomposedStringWithCanonicalMapping)
        var words: [String] = []
        var position = 0
        while position < scalars.count {
            let end = self.end(scalars, position)
            words += parts(scalars[position..<end])
            position = max(end, position + 1)
        }
        return words
    }

    /// The text as tokens that are matched in its normal form are: composed, in lower case, with single spaces.
    static func normalized(_ text: String) -> String {
        var scalars = String.UnicodeScalarView()
        for scalar in lowercased(text.precomposedStringWithCanonicalMapping) {
            let isSpace = kind(scalar) == .space
            if !isSpace || scalars.last != " " { scalars.append(isSpace ? " " : scalar) }
        }
        return String(scalars)
    }

    /// Each character by itself, as the tokenizers library does it: no rule looks at the neighbours.
    private static func lowercased(_ text: String) -> [Unicode.Scalar] {
        text.unicodeScalars.flatMap { $0.properties.lowercaseMapping.unicodeScalars }
    }

    /// Where the word that begins at a place ends; the place itself where there is a space.
    private static func end(_ scalars: [Unicode.Scalar], _ start: Int) -> Int {
        for fixed in marks + contractions where scalars[start...].starts(with: fixed) { return start + fixed.count }
        switch kind(scalars[start]) {
        case .space: return start
        case .number: return start + 1
        case let kind:
            return scalars[start...].firstIndex { self.kind($0) != kind } ?? scalars.count
        }
    }

    /// The marks in angle brackets are one word to CLIP's rule, and three to that of the bytes which follows.
    private static func parts(_ word: ArraySlice<Unicode.Scalar>) -> [String] {
        guard marks.contains(Array(word)) else { return word.isEmpty ? [] : [String(word)] }
        return [String(word.prefix(2)), String(word.dropFirst(2).dropLast(2)), String(word.suffix(2))]
    }

    private enum Kind { case letter, number, space, other }

    private static func kind(_ scalar: Unicode.Scalar) -> Kind {
        switch scalar.properties.generalCategory {
        case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: .letter
        case .decimalNumber, .letterNumber, .otherNumber: .number
        default: scalar.properties.isWhitespace ? .space : .other
        }
    }
}

extension String {
    fileprivate init(_ scalars: some Sequence<Unicode.Scalar>) {
        self.init(String.UnicodeScalarView(scalars))
    }
}
