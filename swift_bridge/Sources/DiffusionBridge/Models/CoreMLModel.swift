// The only file that imports Core ML. On systems without it, the module of that name is this package's stand-in.
import CoreML
import Foundation

/// Where a model may run.
public enum ComputeUnits: String, Sendable, CaseIterable {
    case all
    case cpuAndGPU = "cpu-and-gpu"
    case cpuAndNeuralEngine = "cpu-and-ne"
    case cpuOnly = "cpu-only"

    /// Compute units as the command line, a manifest or coremltools spells them.
    public init(named name: String) throws {
        let wanted = name.lowercased().replacingOccurrences(of: "_", with: "-")
        guard let units = ComputeUnits(rawValue: wanted) else {
            let known = Self.allCases.map(\.rawValue).joined(separator: ", ")
            throw DiffusionError.input("unknown compute units '\(name)': expected one of \(known)")
        }
        self = units
    }

    fileprivate var coreML: MLComputeUnits {
        switch self {
        case .all: .all
        case .cpuAndGPU: .cpuAndGPU
        case .cpuAndNeuralEngine: .cpuAndNeuralEngine
        case .cpuOnly: .cpuOnly
        }
    }
}

/// A model of Core ML. Its calls are made one after the other on a queue of its own, so that they block no task of the
/// caller's.
///
/// Unchecked Sendable: `model` and `kept` are used on the queue alone, and the rest does not change.
final class CoreMLModel: Model, @unchecked Sendable {
    let inputs: [String: TensorSpec]
    let outputs: [String: TensorSpec]
    private let name: String
    private let model: MLModel
    private let types: [String: MLMultiArrayDataType]
    private let queue: DispatchQueue
    private var kept: [String: (tensor: Tensor, array: MLMultiArray)] = [:]

    /// Load a compiled model, or a package, which is compiled first and kept compiled.
    static func load(_ url: URL, _ units: ComputeUnits) async throws -> CoreMLModel {
        let compiled = try await CompiledModels.url(for: url)
        return try await withCheckedThrowingContinuation { continuation in
            DispatchQueue.global().async {
                continuation.resume(with: Result { try CoreMLModel(compiled, name: url.lastPathComponent, units) })
            }
        }
    }

    private init(_ url: URL, name: String, _ units: ComputeUnits) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units.coreML
        do {
            model = try MLModel(contentsOf: url, configuration: configuration)
        } catch {
            throw DiffusionError.package("\(name): cannot be loaded: \(reason(error))")
        }
        self.name = name
        queue = DispatchQueue(label: "DiffusionBridge.\(name)")
        let described = model.modelDescription
        inputs = try Self.specs(described.inputDescriptionsByName, name)
        outputs = try Self.specs(described.outputDescriptionsByName, name)
        types = described.inputDescriptionsByName.compactMapValues { $0.multiArrayConstraint?.dataType }
    }

    private static func specs(
        _ features: [String: MLFeatureDescription], _ model: String
    ) throws -> [String: TensorSpec] {
        var specs: [String: TensorSpec] = [:]
        for (name, feature) in features {
            guard let constraint = feature.multiArrayConstraint else {
                throw DiffusionError.package("\(model): \(name) is no multi-array")
            }
            specs[name] = TensorSpec(name: name, shape: constraint.shape.map(\.intValue))
        }
        return specs
    }

    func predict(_ tensors: [String: Tensor]) async throws -> [String: Tensor] {
        try check(tensors, name)
        try Task.checkCancellation()
        return try await withCheckedThrowingContinuation { continuation in
            queue.async { continuation.resume(with: Result { try self.run(tensors) }) }
        }
    }

    private func run(_ tensors: [String: Tensor]) throws -> [String: Tensor] {
        do {
            let features = try tensors.reduce(into: [String: Any]()) { $0[$1.key] = try array($1.key, $1.value) }
            let provider = try MLDictionaryFeatureProvider(dictionary: features)
            let results = try model.prediction(from: provider)
            var values: [String: Tensor] = [:]
            for name in results.featureNames {
                if let array = results.featureValue(for: name)?.multiArrayValue { values[name] = try tensor(array, name) }
            }
            return values
        } catch let error as DiffusionError {
            throw error
        } catch {
            throw DiffusionError(.model, "\(name): Core ML failed: \(reason(error)); try other compute units")
        }
    }

    /// The array of an input. What a call before gave is converted once: its values lie where they lay, and as they
    /// are kept nobody can have changed them there. Others are written over what the call before was given.
    private func array(_ name: String, _ tensor: Tensor) throws -> MLMultiArray {
        if let (earlier, array) = kept[name], earlier.shares(tensor) { return array }
        let array = try kept[name]?.array
            ?? MLMultiArray(shape: tensor.shape.map { NSNumber(value: $0) }, dataType: types[name] ?? .float32)
        let layout = try layout(array, name)
        array.withUnsafeMutableBytes { bytes, _ in layout.write(tensor.values, to: bytes) }
        kept[name] = (tensor, array)
        return array
    }

    /// The values of an array, whatever its type and however far apart its rows lie.
    private func tensor(_ array: MLMultiArray, _ name: String) throws -> Tensor {
        let layout = try layout(array, name)
        return Tensor(shape: layout.shape, values: array.withUnsafeBytes(layout.read))
    }

    private func layout(_ array: MLMultiArray, _ feature: String) throws -> Layout {
        let elements: [MLMultiArrayDataType: Element] = [
            .float16: .float16, .float32: .float32, .double: .double, .int32: .int32,
        ]
        guard let element = elements[array.dataType] else {
            throw DiffusionError.package("\(name): \(feature) is made of numbers of an unknown type")
        }
        return Layout(shape: array.shape.map(\.intValue), strides: array.strides.map(\.intValue), element: element)
    }
}

/// Core ML compiles a package at every load, which takes minutes for a UNet. So compiled packages are kept in the
/// system's folder of caches, by path, sizes and dates of what they hold.
private enum CompiledModels {
    static func url(for url: URL) async throws -> URL {
        guard url.pathExtension != "mlmodelc" else { return url }
        let files = FileManager.default
        let caches = try files.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let folder = caches.appending("coreml-sd/compiled")
        let kept = folder.appending("\(key(url)).mlmodelc")
        if files.fileExists(atPath: kept.path) { return kept }
        do {
            let made = try await MLModel.compileModel(at: url)
            guard (try? files.createDirectory(at: folder, withIntermediateDirectories: true)) != nil,
                (try? files.moveItem(at: made, to: kept)) != nil || files.fileExists(atPath: kept.path)
            else { return made }
            return kept
        } catch {
            throw DiffusionError.package("\(url.path): cannot be compiled: \(reason(error))")
        }
    }

    private static func key(_ package: URL) -> String {
        let keys: [URLResourceKey] = [.fileSizeKey, .contentModificationDateKey]
        let found = FileManager.default.enumerator(at: package, includingPropertiesForKeys: keys)
        var text = package.standardizedFileURL.path
        let inner = (found?.allObjects as? [URL] ?? []).sorted { $0.path < $1.path }
        for file in inner {
            let values = try? file.resourceValues(forKeys: Set(keys))
            let date = values?.contentModificationDate?.timeIntervalSinceReferenceDate ?? 0
            text += "\n\(file.path) \(values?.fileSize ?? 0) \(date)"
        }
        // 64 bits of Fowler, Noll and Vo's hash, twice with different starts.
        let hash = { (start: UInt64) in text.utf8.reduce(start) { ($0 ^ UInt64($1)) &* 0x100_0000_01B3 } }
        return String(hash(0xCBF2_9CE4_8422_2325), radix: 16) + String(hash(0x9E37_79B9_7F4A_7C15), radix: 16)
    }
}
