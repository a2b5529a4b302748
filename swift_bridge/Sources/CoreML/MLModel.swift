import Foundation

/// A model that a Python child process runs. As strict as Core ML: what does not fit is refused, what has another type
/// is converted to the declared one, and outputs have the declared type.
public final class MLModel {
    public let modelDescription: MLModelDescription
    private let number: Int
    private let name: String
    private let child: Child

    /// Throws for anything but a compiled model, as Core ML does.
    public init(contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()) throws {
        guard url.pathExtension == "mlmodelc" else {
            throw MLModelError(.io, "\(url.path): is no compiled model (.mlmodelc): compile it with compileModel(at:)")
        }
        if let function = configuration.functionName, function != "main" {
            throw MLModelError(.generic, "\(url.path): has no function '\(function)' (it has: main)")
        }
        child = try Child.running()
        name = url.lastPathComponent
        let path = url.resolvingSymlinksInPath().path
        let answer = try child.ask(["do": "load", "path": path]).answer
        guard let number = answer["model"] as? Int else {
            throw MLModelError(.io, "\(path): the child process gave no model")
        }
        self.number = number
        modelDescription = MLModelDescription(
            inputs: try Self.features(answer["inputs"], path), outputs: try Self.features(answer["outputs"], path),
            metadata: try Self.metadata(answer["metadata"], path))
    }

    deinit {
        // A child that has died has freed the model already.
        _ = try? child.ask(["do": "release", "model": number])
    }

    public static func load(
        contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()
    ) async throws -> MLModel {
        try MLModel(contentsOf: url, configuration: configuration)
    }

    /// A link to the package in a temporary folder: the child process reads packages as they are.
    public static func compileModel(at url: URL) async throws -> URL {
        guard FileManager.default.fileExists(atPath: url.path) else {
            throw MLModelError(.io, "\(url.path): no such file")
        }
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent("coreml-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        let name = url.deletingPathExtension().lastPathComponent + ".mlmodelc"
        let link = folder.appendingPathComponent(name)
        try FileManager.default.createSymbolicLink(at: link, withDestinationURL: url.standardizedFileURL)
        return link
    }

    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        let described = modelDescription.inputDescriptionsByName
        let missing = Set(described.keys).subtracting(input.featureNames).sorted()
        let unknown = input.featureNames.subtracting(described.keys).sorted()
        var wrong = missing.map { "missing \($0)" } + unknown.map { "unknown \($0)" }
        var arrays: [(name: String, array: MLMultiArray, type: MLMultiArrayDataType)] = []
        for name in described.keys.sorted() {
            guard let constraint = described[name]?.multiArrayConstraint,
                let array = input.featureValue(for: name)?.multiArrayValue
            else { continue }
            let allowed = constraint.shapeConstraint
            if !allowed.allows(array.shape) {
                let expected = allowed.enumeratedShapes.map { "\($0)" }.joined(separator: " or ")
                wrong.append("\(name) has shape \(array.shape), expected \(expected)")
            }
            arrays.append((name, array, constraint.dataType))
        }
        guard wrong.isEmpty else {
            throw MLModelError(.featureType, "\(name): \(wrong.joined(separator: "; "))")
        }
        return try run(arrays)
    }

    public func prediction(
        from input: any MLFeatureProvider, options: MLPredictionOptions
    ) throws -> any MLFeatureProvider {
        try prediction(from: input)
    }

    /// As Core ML's of macOS 14 and iOS 17: a task that was cancelled gets no prediction.
    public func prediction(
        from input: any MLFeatureProvider, options: MLPredictionOptions = MLPredictionOptions()
    ) async throws -> any MLFeatureProvider {
        try Task.checkCancellation()
        let run: () throws -> any MLFeatureProvider = { try self.prediction(from: input) }
        return try run()
    }

    public func predictions(fromBatch batch: any MLBatchProvider) throws -> any MLBatchProvider {
        MLArrayBatchProvider(array: try (0..<batch.count).map { try prediction(from: batch.features(at: $0)) })
    }

    private func run(
        _ arrays: [(name: String, array: MLMultiArray, type: MLMultiArrayDataType)]
    ) throws -> any MLFeatureProvider {
        let listed = arrays.map { entry in
            ["name": entry.name, "dtype": entry.type.numpyName, "shape": entry.array.shape] as [String: Any]
        }
        let data = try arrays.map { try $0.array.packed(as: $0.type) }
        let (answer, results) = try child.ask(["do": "predict", "model": number, "arrays": listed], data)
        var values: [String: Any] = [:]
        for (entry, data) in zip(answer["arrays"] as? [[String: Any]] ?? [], results) {
            guard let name = entry["name"] as? String, let shape = entry["shape"] as? [Int],
                let type = (entry["dtype"] as? String).flatMap(MLMultiArrayDataType.init(numpyName:))
            else { throw MLModelError(.generic, "\(self.name): the child process gave an array without a type") }
            let array = try MLMultiArray(
                shape: shape.map { NSNumber(value: $0) }, dataType: type, alignment: StandIn.rowAlignment)
            array.unpack(data)
            values[name] = array
        }
        return try MLDictionaryFeatureProvider(dictionary: values)
    }

    private static func features(_ listed: Any?, _ path: String) throws -> [MLFeatureDescription] {
        try (listed as? [[String: Any]] ?? []).map { entry in
            guard let name = entry["name"] as? String, let shape = entry["shape"] as? [Int],
                let type = (entry["dtype"] as? String).flatMap(MLMultiArrayDataType.init(numpyName:))
            else { throw MLModelError(.io, "\(path): an input or output has no multi-array type: \(entry)") }
            let shapes = entry["shapes"] as? [[Int]] ?? []
            return MLFeatureDescription(
                name: name,
                constraint: MLMultiArrayConstraint(
                    shape: shape.map { NSNumber(value: $0) }, dataType: type,
                    shapes: shapes.map { $0.map { NSNumber(value: $0) } }))
        }
    }

    private static func metadata(_ answer: Any?, _ path: String) throws -> [MLModelMetadataKey: Any] {
        let names: [MLModelMetadataKey: String] = [
            .description: "description", .versionString: "version", .author: "author", .license: "license",
        ]
        guard let given = answer as? [String: Any], let others = given["user_defined"] as? [String: String] else {
            throw MLModelError(.io, "\(path): the child process gave no metadata: its coreml-sd is of another version")
        }
        return try names.mapValues { name -> Any in
            guard let text = given[name] as? String else {
                throw MLModelError(.io, "\(path): the child process gave no \(name) in the metadata")
            }
            return text
        }.merging([.creatorDefinedKey: others]) { $1 }
    }
}
