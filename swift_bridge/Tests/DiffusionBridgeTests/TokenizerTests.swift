import Foundation
import Testing

@testable import DiffusionBridge

private struct TokenGolden: Decodable {
    struct Case: Decodable {
        let padding: String
        let prompt: String
        let ids: [Int]
        let rows: [[Int]]
        let weights: [[Float]]
        let lost: String
    }

    let vocabulary: [String: Int]
    let merges: [String]
    let cases: [Case]
    let added: [Case]
}

/// A folder of its own for one test, removed when the test lets go of it.
final class TemporaryFolder {
    let url: URL

    init() throws {
        url = FileManager.default.temporaryDirectory.appendingPathComponent("bridge-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(at: url) }

    func write(_ name: String, _ text: String) throws {
        try Data(text.utf8).write(to: url.appendingPathComponent(name))
    }
}

private func written(_ golden: TokenGolden) throws -> TemporaryFolder {
    let folder = try TemporaryFolder()
    try folder.write("vocab.json", JSON.object(golden.vocabulary.mapValues(JSON.integer)).text)
    try folder.write("merges.txt", "#version: 0.2\n" + golden.merges.joined(separator: "\n") + "\n")
    return folder
}

@Test func tokensEqualTransformers() throws {
    let expected: TokenGolden = try golden("tokens")
    let folder = try written(expected)
    #expect(expected.merges.contains { $0.hasPrefix("#") })
    #expect(Set(expected.cases.map(\.prompt)).count >= 200)
    let paddings = Set(expected.cases.map(\.padding)).map { ($0, try? Tokenizer(contentsOf: folder.url, padding: $0)) }
    let tokenizers = Dictionary(uniqueKeysWithValues: paddings)
    for item in expected.cases {
        let tokenizer = try #require(tokenizers[item.padding] ?? nil)
        let tokens = try tokenizer.encode(item.prompt, pieces: item.rows.count)
        let shown = "\(item.padding) \(item.prompt.prefix(200).debugDescription)"
        if item.prompt.count <= 5000 { #expect(tokenizer.ids(item.prompt) == item.ids, "\(shown)") }
        #expect(tokens.ids == item.rows, "\(shown)")
        #expect(tokens.isWeighted == !item.weights.isEmpty, "\(shown)")
        if tokens.isWeighted { #expect(tokens.weights == item.weights, "\(shown)") }
        #expect(String(tokens.lost.unicodeScalars.prefix(200).map(Character.init)) == item.lost, "\(shown)")
    }
}

@Test func addedTokensAreFoundAsTransformersFindsThem() throws {
    let expected: TokenGolden = try golden("tokens")
    let folder = try written(expected)
    let url = try #require(Bundle.module.url(forResource: "tokens", withExtension: "json", subdirectory: "Golden"))
    let config = try #require(try JSON(contentsOf: url)["config"])
    try folder.write("tokenizer_config.json", config.text)
    let tokenizer = try Tokenizer(contentsOf: folder.url)
    for item in expected.added {
        let tokens = try tokenizer.encode(item.prompt)
        #expect(tokens.ids == item.rows, "\(item.prompt)")
        #expect(tokens.weights == item.weights || item.weights.isEmpty, "\(item.prompt)")
    }
    let added = try #require(config["added_tokens_decoder"]?.object?.first { $0.value["content"]?.string == "sks_1" }?.key)
    try folder.write("tokenizer_config.json", "{}")
    try folder.write("added_tokens.json", "{\"sks_1\": \(added)}")
    #expect(try Tokenizer(contentsOf: folder.url).encode("a sks_1").ids[0].contains { String($0) == added })
    try folder.write("added_tokens.json", "{\"sks_1\": \"x\"}")
    #expect(throws: DiffusionError.self) { try Tokenizer(contentsOf: folder.url) }
}

@Test func aLongPromptKeepsItsEnd() throws {
    let expected: TokenGolden = try golden("tokens")
    let folder = try written(expected)
    let tokens = try Tokenizer(contentsOf: folder.url).encode(String(repeating: "a cat ", count: 100))
    let end = try #require(expected.vocabulary["<|endoftext|>"])
    #expect(tokens.ids[0].count == 77 && tokens.ids[0].last == end)
    #expect(tokens.lost.hasPrefix("a cat"))
}

@Test(arguments: ["(a:11)", "(a:-1)", "((a:5):5)"]) func weightsThatCannotBeUsedAreRefused(prompt: String) {
    #expect(throws: DiffusionError.self) { try Prompt.fragments(prompt) }
}

@Test func whatPadsIsReadFromEitherFile() throws {
    let expected: TokenGolden = try golden("tokens")
    let folder = try written(expected)
    let padded = { try Tokenizer(contentsOf: folder.url, padding: "!").encode("").ids[0][2] }
    #expect(try padded() == expected.vocabulary["!"])
    try folder.write("tokenizer_config.json", #"{"pad_token": "<|endoftext|>"}"#)
    #expect(try padded() == expected.vocabulary["<|endoftext|>"])
    try folder.write("special_tokens_map.json", #"{"pad_token": {"content": "!"}}"#)
    #expect(try padded() == expected.vocabulary["!"])
}

@Test func damagedTokenizersAreNamed() throws {
    let folder = try TemporaryFolder()
    #expect(throws: DiffusionError.self) { try Tokenizer(contentsOf: folder.url) }
    try folder.write("vocab.json", #"{"a": "b"}"#)
    try folder.write("merges.txt", "#version: 0.2\n")
    let error = #expect(throws: DiffusionError.self) { try Tokenizer(contentsOf: folder.url) }
    #expect(error?.message.contains("not a vocabulary") == true)
}

@Test func jsonIsReadAsPythonWritesIt() throws {
    let text = #"{"a": [1, -2.5, 1e3, NaN, -Infinity], "b": "\u65e5\ud83d\ude00\n\"", "c": {}, "d": [null, true]}"#
    let value = try JSON(parsing: Array(text.utf8))
    #expect(value["a"]?.array?[4].number == -.infinity)
    #expect(value["b"]?.string == "日😀\n\"")
    #expect(value["d"] == .array([.null, .bool(true)]))
    for damaged in ["{", "[1,]", "{\"a\" 1}", "\"\\ud83d\"", "nul", "1 2", String(repeating: "[", count: 5000)] {
        #expect(throws: DiffusionError.self) { try JSON(parsing: Array(damaged.utf8)) }
    }
}
