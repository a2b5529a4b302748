import Foundation

/// Tokens that are found in a text whole, before it is split into words: of those that begin first, the longest.
struct WholeTokens: Sendable {
    struct Token: Sendable {
        let text: String
        let number: Int
        /// Not within a word.
        var isSingleWord = false
        /// Found in the composed lower-case text.
        var isNormalized = false
    }

    private let tokens: [Token]

    init(_ tokens: [Token]) {
        self.tokens = tokens.filter { !$0.text.isEmpty }
    }

    var isEmpty: Bool { tokens.isEmpty }

    func text(of number: Int) -> String? { tokens.first { $0.number == number }?.text }

    /// The tokens that were added to a folder's vocabulary: with how they match in tokenizer_config.json, else in
    /// added_tokens.json.
    static func read(_ folder: URL) throws -> [Token] {
        let read = { (name: String) in
            let url = folder.appending(name)
            return FileManager.default.fileExists(atPath: url.path) ? try JSON(contentsOf: url) : JSON.null
        }
        let listed = try read("added_tokens.json").object ?? [:]
        let described = try read("tokenizer_config.json")["added_tokens_decoder"]?.object ?? [:]
        var tokens: [Int: Token] = [:]
        for (text, number) in listed {
            guard let number = number.integer else { throw damage(folder, "added_tokens.json") }
            tokens[number] = Token(text: text, number: number, isNormalized: true)
        }
        for (key, value) in described {
            guard let number = Int(key), let text = value["content"]?.string else {
                throw damage(folder, "tokenizer_config.json")
            }
            tokens[number] = Token(
                text: text, number: number, isSingleWord: value["single_word"]?.bool ?? false,
                isNormalized: value["normalized"]?.bool ?? (value["special"]?.bool != true))
        }
        return tokens.values.sorted { $0.number < $1.number }
    }

    private static func damage(_ folder: URL, _ name: String) -> DiffusionError {
        .package("\(folder.appending(name).path): its added tokens are damaged: expected texts and numbers")
    }

    /// The numbers of the tokens in a text, and of what lies between them.
    func split(_ text: String, _ between: (String) -> [Int]) -> [Int] {
        var numbers: [Int] = []
        var rest = text[...]
        while let (range, number) = first(in: rest, of: text) {
            numbers += between(String(rest[..<range.lowerBound])) + [number]
            rest = text[range.upperBound...]
        }
        return numbers + between(String(rest))
    }

    private func first(in rest: Substring, of text: String) -> (Range<String.Index>, Int)? {
        let found = tokens.compactMap { token in range(of: token, in: rest, of: text).map { ($0, token.number) } }
        return found.min { ($0.0.lowerBound, $1.0.upperBound) < ($1.0.lowerBound, $0.0.upperBound) }
    }

    private func range(of token: Token, in rest: Substring, of text: String) -> Range<String.Index>? {
        var start = rest.startIndex
        while let range = text.range(of: token.text, options: .literal, range: start..<text.endIndex) {
            let before = text.unicodeScalars[..<range.lowerBound].last
            let after = text.unicodeScalars[range.upperBound...].first
            guard token.isSingleWord, Self.isOfWord(before) || Self.isOfWord(after) else { return range }
            start = range.upperBound
        }
        return nil
    }

    private static func isOfWord(_ scalar: Unicode.Scalar?) -> Bool {
        guard let scalar else { return false }
        return scalar.properties.isAlphabetic || scalar.properties.numericType != nil || scalar == "_"
    }
}
