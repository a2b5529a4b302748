import CoreML
import Foundation
import Testing

/// Packages that `tests/swift` makes and names in the environment: they compute next to nothing.
private let folder = ProcessInfo.processInfo.environment["BRIDGE_MODELS"].map { URL(fileURLWithPath: $0) }

private let described = ProcessInfo.processInfo.environment["BRIDGE_DESCRIBED"].map { URL(fileURLWithPath: $0) }

private func unet() async throws -> MLModel {
    let url = try #require(folder).appendingPathComponent("Stable_Diffusion_version_toy_unet.mlpackage")
    return try MLModel(contentsOf: try await MLModel.compileModel(at: url))
}

/// Where nothing may suspend, this and not the asynchronous function of the same name is meant.
private func predicted(_ model: MLModel, _ provider: any MLFeatureProvider) throws -> any MLFeatureProvider {
    try model.prediction(from: provider)
}

private func zeros(_ model: MLModel, _ type: MLMultiArrayDataType? = nil) throws -> [String: MLMultiArray] {
    try model.modelDescription.inputDescriptionsByName.mapValues { feature in
        let constraint = try #require(feature.multiArrayConstraint)
        return try MLMultiArray(shape: constraint.shape, dataType: type ?? constraint.dataType)
    }
}

@Suite(.enabled(if: folder != nil, "no BRIDGE_MODELS: run `make swift`"), .serialized)
struct StandInTests {
    @Test func aPackageMustBeCompiledFirst() throws {
        let url = try #require(folder).appendingPathComponent("Stable_Diffusion_version_toy_unet.mlpackage")
        let error = #expect(throws: MLModelError.self) { try MLModel(contentsOf: url) }
        #expect(error?.description.contains("compile it") == true)
    }

    @Test func theInterfaceIsTheModels() async throws {
        let description = try await unet().modelDescription
        #expect(Set(description.inputDescriptionsByName.keys) == ["sample", "timestep", "encoder_hidden_states"])
        let sample = try #require(description.inputDescriptionsByName["sample"]?.multiArrayConstraint)
        #expect(sample.shape == [2, 4, 8, 8] && sample.dataType == .float16)
        #expect(description.outputDescriptionsByName["noise_pred"]?.multiArrayConstraint?.dataType == .float16)
    }

    @Test func aFixedShapeIsTheOnlyOneEnumerated() async throws {
        let description = try await unet().modelDescription
        let fixed = try #require(description.inputDescriptionsByName["sample"]?.multiArrayConstraint?.shapeConstraint)
        #expect(fixed.type == .enumerated && fixed.enumeratedShapes == [[2, 4, 8, 8]])
        #expect(fixed.sizeRangeForDimension.map(\.rangeValue) == [2, 4, 8, 8].map { NSRange(location: $0, length: 1) })
    }

    @Test func everyEnumeratedShapeIsTakenAndNoOther() async throws {
        let model = try MLModel(contentsOf: try await MLModel.compileModel(at: try #require(described)))
        let constraint = try #require(model.modelDescription.inputDescriptionsByName["x"]?.multiArrayConstraint)
        let shapes = constraint.shapeConstraint
        #expect(constraint.shape == [1, 2] && shapes.type == .enumerated && shapes.enumeratedShapes == [[1, 2], [3, 2]])
        #expect(shapes.sizeRangeForDimension.map(\.rangeValue) == [NSRange(1...3), NSRange(2...2)])
        func output(_ shape: [NSNumber]) throws -> MLMultiArray? {
            let array = try MLMultiArray(shape: shape, dataType: .float16)
            for index in 0..<array.count { array[index] = 1 }
            let provider = try MLDictionaryFeatureProvider(dictionary: ["x": array])
            return try predicted(model, provider).featureValue(for: "y")?.multiArrayValue
        }
        for shape in shapes.enumeratedShapes {
            let array = try #require(try output(shape))
            #expect(array.shape == shape && (0..<array.count).allSatisfy { abs(array[$0].doubleValue - tanh(1)) < 1e-3 })
        }
        // Within the range of every dimension, but not among the shapes.
        let error = #expect(throws: MLModelError.self) { try output([2, 2]) }
        #expect(error?.description.contains("x has shape [2, 2], expected [1, 2] or [3, 2]") == true)
    }

    @Test func theMetadataAreTheAuthors() async throws {
        let model = try MLModel(contentsOf: try await MLModel.compileModel(at: try #require(described)))
        let metadata = model.modelDescription.metadata
        let texts: [MLModelMetadataKey: String] = [
            .description: "Two shapes", .versionString: "1.2", .author: "Å. Author", .license: "MIT",
        ]
        for (key, text) in texts { #expect(metadata[key] as? String == text) }
        #expect(metadata[.creatorDefinedKey] as? [String: String] == ["coreml_sd.key": "value"])
        let none = try await unet().modelDescription.metadata
        for key in texts.keys { #expect(none[key] as? String == "") }
        #expect((none[.creatorDefinedKey] as? [String: String])?["com.github.apple.coremltools.version"] != nil)
    }

    @Test func hintsAreCoreMLsAndChangeNoResult() async throws {
        let configuration = MLModelConfiguration()
        #expect(configuration.optimizationHints == MLOptimizationHints())
        #expect(configuration.optimizationHints.reshapeFrequency == .frequent)
        #expect(configuration.optimizationHints.specializationStrategy == .default)
        configuration.optimizationHints.reshapeFrequency = .infrequent
        configuration.optimizationHints.specializationStrategy = .fastPrediction
        let compiled = try await MLModel.compileModel(at: try #require(described))
        let provider = try MLDictionaryFeatureProvider(
            dictionary: ["x": MLMultiArray(MLShapedArray<Float>(scalars: [0.5, -2], shape: [1, 2]))])
        let results = try [MLModelConfiguration(), configuration].map { given in
            let output = try predicted(MLModel(contentsOf: compiled, configuration: given), provider)
            return MLShapedArray<Float>(converting: try #require(output.featureValue(for: "y")?.multiArrayValue)).scalars
        }
        #expect(results[0] == results[1])
    }

    @Test func whatDoesNotFitIsRefusedInOneError() async throws {
        let model = try await unet()
        var inputs: [String: Any] = try zeros(model)
        inputs["timestep"] = nil
        inputs["colour"] = try MLMultiArray(shape: [1], dataType: .float32)
        inputs["sample"] = try MLMultiArray(shape: [1, 4, 8, 8], dataType: .float16)
        let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
        let error = #expect(throws: MLModelError.self) { try predicted(model, provider) }
        for part in ["missing timestep", "unknown colour", "sample has shape [1, 4, 8, 8], expected [2, 4, 8, 8]"] {
            #expect(error?.description.contains(part) == true)
        }
        #expect(throws: MLModelError.self) { try MLDictionaryFeatureProvider(dictionary: ["sample": 1]) }
    }

    @Test func anUnknownFunctionIsRefused() async throws {
        let url = try #require(folder).appendingPathComponent("Stable_Diffusion_version_toy_unet.mlpackage")
        let compiled = try await MLModel.compileModel(at: url)
        let configuration = MLModelConfiguration()
        configuration.functionName = "other"
        #expect(throws: MLModelError.self) { try MLModel(contentsOf: compiled, configuration: configuration) }
    }

    @Test func inputsOfOtherTypesAreConvertedAndOutputsHaveTheDeclaredOne() async throws {
        let model = try await unet()
        var results: [[Double]] = []
        for type in [MLMultiArrayDataType.float16, .float32, .double] {
            let inputs = try zeros(model, type)
            let sample = try #require(inputs["sample"])
            for index in 0..<sample.count { sample[index] = NSNumber(value: Double(index) / 256) }
            let output = try predicted(model, MLDictionaryFeatureProvider(dictionary: inputs))
            let array = try #require(output.featureValue(for: "noise_pred")?.multiArrayValue)
            #expect(array.dataType == .float16)
            results.append((0..<array.count).map { array[$0].doubleValue })
        }
        #expect(results[0] == results[1] && results[1] == results[2] && results[0].contains { $0 != 0 })
    }

    @Test func rowsHaveGapsWhenAskedFor() async throws {
        let model = try await unet()
        let provider = try MLDictionaryFeatureProvider(dictionary: try zeros(model))
        let plain = try #require(
            try predicted(model, provider).featureValue(for: "noise_pred")?.multiArrayValue)
        StandIn.rowAlignment = 64
        defer { StandIn.rowAlignment = 1 }
        let padded = try #require(
            try predicted(model, provider).featureValue(for: "noise_pred")?.multiArrayValue)
        #expect(plain.strides == [256, 64, 8, 1] && padded.strides == [1024, 256, 32, 1])
        #expect((0..<plain.count).allSatisfy { plain[$0] == padded[$0] })
    }

    @Test func aModelIsFreedWhenItIsReleased() async throws {
        var model: MLModel? = try await unet()
        weak let released = model
        #expect(released != nil)
        model = nil
        #expect(released == nil)
    }

    @Test func aCancelledTaskGetsNoPrediction() async throws {
        let provider = try MLDictionaryFeatureProvider(dictionary: try zeros(try await unet()))
        #expect(try await unet().prediction(from: provider, options: MLPredictionOptions()).featureNames == ["noise_pred"])
        let task = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            let model = try await unet()
            _ = try await model.prediction(from: MLDictionaryFeatureProvider(dictionary: try zeros(model)))
        }
        await #expect(throws: CancellationError.self) { try await task.value }
    }

    @Test func aBatchIsPredictedInOrder() async throws {
        let model = try await unet()
        let providers = try (0..<3).map { number in
            let inputs = try zeros(model)
            try #require(inputs["timestep"])[0] = NSNumber(value: 100 * number)
            return try MLDictionaryFeatureProvider(dictionary: inputs)
        }
        let batch = try model.predictions(fromBatch: MLArrayBatchProvider(array: providers))
        for (index, provider) in providers.enumerated() {
            let alone = try predicted(model, provider).featureValue(for: "noise_pred")?.multiArrayValue
            let found = batch.features(at: index).featureValue(for: "noise_pred")?.multiArrayValue
            #expect(alone?[0] == found?[0] && batch.count == 3)
        }
    }

    @Test func aChildThatDiesIsAnErrorAndTheNextModelGetsANewOne() async throws {
        let model = try await unet()
        kill(try #require(StandIn.childProcess), SIGKILL)
        let provider = try MLDictionaryFeatureProvider(dictionary: try zeros(model))
        let error = #expect(throws: MLModelError.self) { try predicted(model, provider) }
        #expect(error?.description.contains("ended with code 9") == true)
        let again = try await unet()
        #expect(throws: Never.self) { try predicted(again, provider) }
    }
}

@Test func shapedArraysAndMultiArraysHoldTheSameNumbers() throws {
    let shaped = MLShapedArray<Float>(scalars: (0..<6).map { Float($0) }, shape: [2, 3])
    let array = MLMultiArray(shaped)
    #expect(array.dataType == .float32 && array.shape == [2, 3] && shaped.strides == [3, 1])
    #expect(MLShapedArray<Float>(array).scalars == shaped.scalars)
    #expect(MLShapedArray<Float16>(converting: array).scalars == [0, 1, 2, 3, 4, 5])
    let bytes = shaped.withUnsafeShapedBufferPointer { pointer, _, _ in Data(buffer: pointer) }
    #expect(MLShapedArray<Float>(data: bytes, shape: [3, 2]).scalars == shaped.scalars)
    #expect(MLShapedArray<Int32>(repeating: 7, shape: [2]).scalars == [7, 7])
    let rows = MLMultiArray(concatenating: [array, array], axis: 0, dataType: .float16)
    #expect(rows.shape == [4, 3] && rows.dataType == .float16 && (0..<12).map { rows[$0].intValue % 6 } == (0..<12).map { $0 % 6 })
    let columns = MLMultiArray(concatenating: [array, array], axis: 1, dataType: .double)
    #expect((0..<12).map { columns[$0].intValue } == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
}

@Test func readingNumbersAsAnotherTypeTraps() async {
    await #expect(processExitsWith: .failure) {
        _ = MLShapedArray<Float16>(MLMultiArray(MLShapedArray<Float>(repeating: 1, shape: [4])))
    }
    await #expect(processExitsWith: .failure) { _ = MLShapedArray<Float>(repeating: 1, shape: [4]).scalars[4] }
    await #expect(processExitsWith: .failure) { _ = MLShapedArray<Float>(scalars: [1, 2], shape: [3]) }
}
