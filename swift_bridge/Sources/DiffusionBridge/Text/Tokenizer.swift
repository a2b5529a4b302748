import Foundation

/// The tokens of a prompt. `ids` and `weights` have one row per piece; `lost` is the text that found no place.
struct Tokens: Equatable, Sendable {
    var ids: [[Int]]
    var weights: [[Float]]
    var lost = ""

    var isWeighted: Bool { weights.contains { $0.contains { $0 != 1 } } }
}

/// CLIP's tokenizer, equal to transformers' CLIPTokenizer.
struct Tokenizer: Sendable {
    static let usualLength = 77
    private static let files = ["vocab.json", "merges.txt"]
    private let pairs: BytePairs
    private let names: [Int: String]
    /// Found in a text as they are, and in its normal form.
    private let special: WholeTokens
    private let added: WholeTokens
    /// What is called so in the files, textual inversions above all.
    private let addedNames: Set<String>
    private let start: Int
    private let end: Int
    private let padding: Int
    /// How many tokens the text encoder takes, start and end included.
    let length: Int

    /// The tokenizer of a folder with vocab.json and merges.txt; settings from tokenizer_config.json and
    /// special_tokens_map.json where they lie beside them. `padding` is used where no file says what pads.
    init(contentsOf folder: URL, length: Int = usualLength, padding: String? = nil) throws {
        let missing = Self.files.filter { !FileManager.default.fileExists(atPath: folder.appending($0).path) }
        guard missing.isEmpty else {
            throw DiffusionError.input(
                "\(folder.path): no \(missing.joined(separator: " and no ")): name the tokenizer's folder "
                    + "(the checkpoint's `tokenizer` folder has both files)")
        }
        let file = folder.appending("vocab.json")
        let members = try JSON(contentsOf: file).object ?? [:]
        let numbers = members.compactMapValues(\.integer)
        guard !numbers.isEmpty, numbers.count == members.count else {
            throw DiffusionError.package("\(file.path): not a vocabulary: expected an object of token -> number")
        }
        let words = try Self.specialWords(folder, padding: padding)
        let found = words.map { numbers[$0] }
        guard let start = found[0], let end = found[1], let pad = found[2] else {
            throw DiffusionError.package("\(file.path): lacks the start, end or padding token of CLIP")
        }
        (self.start, self.end, self.padding, self.length) = (start, end, pad, length)
        let more = try WholeTokens.read(folder).filter { !words.contains($0.text) }
        special = WholeTokens(
            zip(words, [start, end, pad]).map { WholeTokens.Token(text: $0, number: $1) }
                + more.filter { !$0.isNormalized })
        added = WholeTokens(
            more.filter(\.isNormalized).map {
                WholeTokens.Token(
                    text: WordSplitter.normalized($0.text), number: $0.number, isSingleWord: $0.isSingleWord)
            })
        addedNames = Set(more.map(\.text))
        names = Dictionary(numbers.map { ($0.value, $0.key) } + more.map { ($0.number, $0.text) }) { first, _ in first }
        pairs = try BytePairs(numbers: numbers, merges: Self.merges(folder), unknown: end)
    }

    /// Up to `pieces` pieces of `length` tokens; pieces without text are those of an empty prompt.
    func encode(_ prompt: String, pieces: Int = 1) throws -> Tokens {
        var ids: [Int] = []
        var weights: [Float] = []
        for fragment in try Prompt.fragments(prompt) {
            let part = self.ids(allVectors(fragment.text))
            ids += part
            weights += part.map { _ in Float(fragment.weight) }
        }
        let room = length - 2
        let starts = (0..<pieces).map { $0 * room }
        let rows = starts.map { ids.dropFirst($0).prefix(room) }
        let counts = starts.map { weights.dropFirst($0).prefix(room) }
        return Tokens(
            ids: rows.map { filled([start] + $0 + [end], padding) },
            weights: counts.map { filled([1] + $0, 1) },
            lost: ids.count > room * pieces ? text(ids.dropFirst(room * pieces)) : "")
    }

    /// The token numbers of a text, without start and end. The start, end and padding tokens are found in the text as
    /// they are: so an SD 2 tokenizer, which pads with "!", reads every "!" as its padding, as transformers does.
    func ids(_ text: String) -> [Int] {
        special.split(text) { part in
            guard !added.isEmpty else { return words(part) }
            return added.split(WordSplitter.normalized(part), words)
        }
    }

    private func words(_ text: String) -> [Int] {
        WordSplitter.words(text).flatMap(pairs.encode)
    }

    /// The token of a number, as messages name it.
    func name(of number: Int) -> String { names[number] ?? "?" }

    /// A textual inversion of several vectors is the tokens `<name>`, `<name>_1`, …: the prompt names the first alone,
    /// and diffusers' pipelines put the others after it, wherever the prompt has its letters.
    private func allVectors(_ text: String) -> String {
        guard !addedNames.isEmpty else { return text }
        var made = text
        var done: Set<Int> = []
        for number in ids(text) where done.insert(number).inserted {
            guard let token = added.text(of: number), addedNames.contains(token), addedNames.contains("\(token)_1")
            else { continue }
            var vectors = [token]
            while addedNames.contains("\(token)_\(vectors.count)") { vectors.append("\(token)_\(vectors.count)") }
            made = made.replacingOccurrences(of: token, with: vectors.joined(separator: " "), options: .literal)
        }
        return made
    }

    /// The text of token numbers.
    private func text(_ ids: some Sequence<Int>) -> String {
        let joined = ids.map { names[$0] ?? "" }.joined()
        let bytes = joined.flatMap { letter in ByteAlphabet.bytes[letter].map { [$0] } ?? Array(letter.utf8) }
        return String(decoding: bytes, as: UTF8.self).replacingOccurrences(of: "</w>", with: " ")
            .trimmingCharacters(in: .whitespacesAndNewlines)
    }

    private func filled<Value>(_ values: [Value], _ filler: Value) -> [Value] {
        values + [Value](repeating: filler, count: length - values.count)
    }

    private static func merges(_ folder: URL) throws -> [Substring] {
        let url = folder.appending("merges.txt")
        do {
            let text = try String(contentsOf: url, encoding: .utf8)
            return text.split(whereSeparator: \.isNewline).filter { !$0.hasPrefix("#version") }
        } catch {
            throw DiffusionError.package("\(url.path): cannot be read as text: \(reason(error))")
        }
    }

    /// The start, end and padding tokens. special_tokens_map.json counts before tokenizer_config.json, as in
    /// transformers.
    private static func specialWords(_ folder: URL, padding: String?) throws -> [String] {
        let usual = ["<|startoftext|>", "<|endoftext|>", padding ?? "<|endoftext|>"]
        var said: [String: String] = [:]
        var isConfigured = false
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let url = folder.appending(name)
            guard FileManager.default.fileExists(atPath: url.path) else { continue }
            isConfigured = true
            for (key, value) in try JSON(contentsOf: url).object ?? [:] {
                if let word = value.string ?? value["content"]?.string { said[key] = word }
            }
        }
        let fallback = isConfigured ? [usual[0], usual[1], usual[1]] : usual
        return zip(["bos_token", "eos_token", "pad_token"], fallback).map { said[$0] ?? $1 }
    }
}

extension URL {
    /// A path below this folder.
    func appending(_ path: String) -> URL { appendingPathComponent(path) }
}
