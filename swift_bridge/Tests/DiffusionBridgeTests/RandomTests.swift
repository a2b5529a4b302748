import Testing

@testable import DiffusionBridge

private struct RandomCase: Decodable, Sendable {
    let source: String
    let seed: UInt64
    let calls: [Int]
    let bits: [UInt32]
}

@Test func randomNumbersEqualPythonsBitForBit() throws {
    let cases: [RandomCase] = try golden("random")
    #expect(cases.count == 8)
    for expected in cases {
        let source = try #require(RandomSource(rawValue: expected.source))
        var generator = source.seeded(expected.seed)
        let drawn = expected.calls.flatMap { generator.normal($0) }.map(\.bitPattern)
        let wrong = zip(drawn, expected.bits).enumerated().filter { $0.element.0 != $0.element.1 }
        #expect(drawn.count == expected.bits.count)
        #expect(
            wrong.isEmpty,
            "\(expected.source), seed \(expected.seed): \(wrong.count) of \(drawn.count) differ, first \(wrong.first?.offset ?? 0)")
    }
}

@Test func oneSourceForEachPictureDrawsEachAlone() throws {
    var both = Noise(seeds: [3, 4], source: .torch)
    var second = Noise(seeds: [4], source: .torch)
    let drawn = try both.normal([2, 4, 8, 8])
    #expect(try drawn.rows(1..<2) == second.normal([1, 4, 8, 8]))
    #expect(throws: DiffusionError.self) { try both.normal([3, 4, 8, 8]) }
}
