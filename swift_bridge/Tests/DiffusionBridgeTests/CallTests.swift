import Foundation
import Testing

@testable import DiffusionBridge

/// A model that remembers what it was given and answers with a function of it.
private actor Recorder: Model {
    nonisolated let inputs: [String: TensorSpec]
    nonisolated let outputs: [String: TensorSpec] = [:]
    private let answer: @Sendable ([String: Tensor]) -> [String: Tensor]
    private(set) var given: [[String: Tensor]] = []

    init(_ shapes: [String: [Int]], answer: @escaping @Sendable ([String: Tensor]) -> [String: Tensor]) {
        inputs = Dictionary(uniqueKeysWithValues: shapes.map { ($0, TensorSpec(name: $0, shape: $1)) })
        self.answer = answer
    }

    func predict(_ tensors: [String: Tensor]) throws -> [String: Tensor] {
        try check(tensors, "recorder")
        given.append(tensors)
        return answer(tensors)
    }
}

private func named(_ model: Recorder, _ name: String) async throws -> NamedModel {
    try await Models([name: { model }], keeps: true).model(name)
}

/// Answers each row with its text's number times ten, plus its latent.
private func unet(batch: Int, channels: Int = 1) -> Recorder {
    Recorder([
        "sample": [batch, channels, 1, 1], "timestep": [batch], "encoder_hidden_states": [batch, 1, 1, 1],
    ]) { tensors in
        let states = tensors["encoder_hidden_states"]?.values ?? []
        let sample = tensors["sample"].map { sample in (0..<batch).map { sample.rows($0..<$0 + 1).values[0] } } ?? []
        return ["noise_pred": Tensor(shape: [batch, 1, 1, 1], values: zip(states, sample).map { 10 * $0 + $1 })]
    }
}

@Test(arguments: [1, 2, 3, 4]) func anyBatchSizeServesAnyNumberOfPictures(batch: Int) async throws {
    for (scale, rowsPerPicture) in [(2.0, 2), (1.0, 1), (0.5, 1)] {
        let model = unet(batch: batch)
        // Guided, the texts are unconditional and text of each of three pictures, in turn.
        let texts = Tensor(shape: [3 * rowsPerPicture, 1, 1, 1], values: (0..<3 * rowsPerPicture).map { Float($0) })
        let guidance = try Guidance(
            try await named(model, "unet"), pictures: 3, Guidance.Conditions(rows: ["encoder_hidden_states": texts]),
            scale: scale)
        let latents = Tensor(shape: [3, 1, 1, 1], values: [0.1, 0.2, 0.3])
        let found = try await guidance.predict(latents, 7).values
        let expected: [Float] = scale > 1 ? [20.1, 40.2, 60.3] : [0.1, 10.2, 20.3]
        #expect(zip(found, expected).allSatisfy { abs($0 - $1) < 1e-4 } && found.count == 3)
        #expect(await model.given.count == (3 * rowsPerPicture + batch - 1) / batch)
        #expect(await model.given.allSatisfy { $0["timestep"]?.values == [Float](repeating: 7, count: batch) })
    }
}

@Test func channelsFollowTheLatents() async throws {
    let model = unet(batch: 2, channels: 3)
    let texts = Tensor(shape: [4, 1, 1, 1], values: [0, 1, 0, 1])
    let seen = Tensor(shape: [2, 2, 1, 1], values: [5, 6, 7, 8])
    let guidance = try Guidance(
        try await named(model, "unet"), pictures: 2,
        Guidance.Conditions(rows: ["encoder_hidden_states": texts], channels: seen), scale: 2)
    _ = try await guidance.predict(Tensor(shape: [2, 1, 1, 1], values: [0.1, 0.2]), 7)
    #expect(await model.given.map { $0["sample"]?.values } == [[0.1, 5, 6, 0.1, 5, 6], [0.2, 7, 8, 0.2, 7, 8]])
}

@Test func aUNetThatNothingIsKnownOfIsRefused() async throws {
    let model = Recorder(["sample": [2, 4, 1, 1], "timestep": [2], "colour": [1]]) { _ in [:] }
    let texts = Tensor(repeating: 0, shape: [2, 1, 1, 1])
    let wanted = try await named(model, "unet")
    let error = #expect(throws: DiffusionError.self) {
        try Guidance(wanted, pictures: 1, Guidance.Conditions(rows: ["encoder_hidden_states": texts]), scale: 2)
    }
    #expect(error?.message.contains("fill colour") == true)
    #expect(error?.message.contains("no place for encoder_hidden_states") == true)
}

@Test func anOutputIsChosenByItsName() async throws {
    let model = Recorder(["x": [1]]) { _ in
        ["a": Tensor(repeating: 1, shape: [1]), "wanted": Tensor(repeating: 2, shape: [1]), "z": Tensor(repeating: 3, shape: [1])]
    }
    let input = ["x": Tensor(repeating: 0, shape: [1])]
    #expect(try await named(model, "m").one("wanted", input).values == [2])
    let error = await #expect(throws: DiffusionError.self) { try await named(model, "m").one("other", input) }
    #expect(error?.message.contains("it has: a, wanted, z") == true)
    let broken = Recorder(["x": [1]]) { _ in ["y": Tensor(repeating: .nan, shape: [1])] }
    let damage = await #expect(throws: DiffusionError.self) { try await named(broken, "m").one("y", input) }
    #expect(damage?.kind == .model)
}

@Test func theSafetyCheckerSeesWhatCLIPsProcessorMakes() async throws {
    struct Golden: Decodable {
        struct Clip: Decodable {
            let picture: Data
            let width: Int
            let height: Int
            let side: Int
            let input: Data
        }
        let clips: [Clip]
    }
    for item in try golden("pictures", as: Golden.self).clips {
        let picture = try Picture(width: item.width, height: item.height, bytes: Array(item.picture))
        let expected = floats(item.input)
        let found = SafetyChecker.clipInput(picture, item.side)
        #expect(found.shape == [1, 3, item.side, item.side])
        #expect(zip(found.values, expected).allSatisfy { abs($0 - $1) < 1e-5 } && found.values.count == expected.count)
        // `images` is height by width, and zeros where the checker was converted for another size.
        for height in [item.height, item.height + 1] {
            let shapes = ["clip_input": found.shape, "images": [1, height, item.width, 3], "adjustment": [1]]
            let checker = Recorder(shapes) { _ in ["has_nsfw_concepts": Tensor(repeating: 1, shape: [1, 1, 1, 1])] }
            #expect(try await SafetyChecker.isFlagged(picture, by: try await named(checker, "safety_checker")))
            let images = await checker.given[0]["images"]?.values
            #expect(images?.first == (height == item.height ? Float(picture.bytes[0]) / 255 : 0))
        }
    }
}

@Test func timeIDsAreThoseOfDiffusers() throws {
    var sizes = SizeConditioning()
    #expect(try sizes.timeIDs(size: [64, 96], count: 6).prompt == [64, 96, 0, 0, 64, 96])
    #expect(try sizes.timeIDs(size: [64, 96], count: 5).negative == [64, 96, 0, 0, 2.5])
    sizes.originalSize = [256, 192]
    sizes.cropsCoordsTopLeft = [8, 16]
    sizes.negativeOriginalSize = [512, 512]
    sizes.negativeTargetSize = [32, 48]
    let (prompt, negative) = try sizes.timeIDs(size: [64, 96], count: 6)
    #expect(prompt == [256, 192, 8, 16, 64, 96] && negative == [512, 512, 0, 0, 32, 48])
    #expect(throws: DiffusionError.self) { try sizes.timeIDs(size: [64, 96], count: 7) }
    sizes.targetSize = [1]
    #expect(throws: DiffusionError.self) { try sizes.timeIDs(size: [64, 96], count: 6) }
}

@Test func theTaskFollowsFromChannelsAndFromWhatIsGiven() throws {
    let picture = try Picture(width: 1, height: 1, bytes: [0, 0, 0])
    var request = Request(prompt: "x")
    #expect(try Purpose(channels: 4, request) == .textToImage)
    #expect(throws: DiffusionError.self) { try Purpose(channels: 9, request) }
    request.image = picture
    #expect(try Purpose(channels: 4, request) == .imageToImage)
    #expect(try Purpose(channels: 5, request) == .depthToImage)
    #expect(try Purpose(channels: 7, request) == .upscaling)
    request.mask = picture
    #expect(try Purpose(channels: 4, request) == .blending)
    #expect(try Purpose(channels: 9, request) == .inPainting)
    let error = #expect(throws: DiffusionError.self) { try Purpose(channels: 7, request) }
    #expect(error?.message.contains("given an image and a mask, but these models do upscaling") == true)
    #expect(throws: DiffusionError.self) { try Purpose(channels: 8, request) }
}
