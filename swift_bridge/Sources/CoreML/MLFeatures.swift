import Foundation

/// An error of Core ML's; its description says what, where, got and expected.
public struct MLModelError: Error, LocalizedError, CustomStringConvertible, Sendable {
    public enum Code: Int, Sendable {
        case generic = 0
        case featureType = 1
        case io = 3
    }

    public let code: Code
    public let description: String

    init(_ code: Code, _ description: String) {
        self.code = code
        self.description = description
    }

    public var errorDescription: String? { description }
}

public enum MLFeatureType: Int, Sendable {
    case invalid = 0
    case multiArray = 5
}

/// A value for an input or of an output.
public final class MLFeatureValue {
    public let multiArrayValue: MLMultiArray?

    public init(multiArray: MLMultiArray) {
        multiArrayValue = multiArray
    }

    public var type: MLFeatureType { multiArrayValue == nil ? .invalid : .multiArray }
}

/// Values by name. The names are a set: their order means nothing.
public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    public let dictionary: [String: MLFeatureValue]

    /// From multi-arrays or feature values; throws for anything else.
    public init(dictionary: [String: Any]) throws {
        self.dictionary = try dictionary.mapValues { value in
            if let feature = value as? MLFeatureValue { return feature }
            guard let array = value as? MLMultiArray else {
                throw MLModelError(.featureType, "a feature is a \(type(of: value)): expected a multi-array")
            }
            return MLFeatureValue(multiArray: array)
        }
    }

    public var featureNames: Set<String> { Set(dictionary.keys) }
    public func featureValue(for featureName: String) -> MLFeatureValue? { dictionary[featureName] }
}

public protocol MLBatchProvider {
    var count: Int { get }
    func features(at index: Int) -> any MLFeatureProvider
}

public final class MLArrayBatchProvider: MLBatchProvider {
    public let array: [any MLFeatureProvider]

    public init(array: [any MLFeatureProvider]) {
        self.array = array
    }

    public var count: Int { array.count }
    public func features(at index: Int) -> any MLFeatureProvider { array[index] }
}

/// The raw values are Core ML's.
public enum MLMultiArrayShapeConstraintType: Int, Sendable {
    case unspecified = 1
    case enumerated = 2
    case range = 3
}

/// Which shapes are allowed. A fixed shape is `enumerated` with one shape, as Core ML says it; `unspecified` is what
/// declares no shape, as outputs may. Ranges of shapes are not: the models that have them run at their default shape.
public final class MLMultiArrayShapeConstraint {
    public let type: MLMultiArrayShapeConstraintType
    public let enumeratedShapes: [[NSNumber]]
    /// The sizes that each dimension may have, as an `NSRange`: from the smallest, as many as there are to the largest.
    public let sizeRangeForDimension: [NSValue]

    init(shapes: [[NSNumber]]) {
        let declared = shapes.filter { !$0.isEmpty }
        type = declared.isEmpty ? .unspecified : .enumerated
        enumeratedShapes = declared
        let rank = declared.map(\.count).min() ?? 0
        sizeRangeForDimension = (0..<rank).map { axis in
            let sizes = declared.map { $0[axis].intValue }
            let (least, most) = (sizes.min() ?? 0, sizes.max() ?? 0)
            return NSValue(range: NSRange(location: least, length: most - least + 1))
        }
    }

    func allows(_ shape: [NSNumber]) -> Bool { type == .unspecified || enumeratedShapes.contains(shape) }
}

public final class MLMultiArrayConstraint {
    public let shape: [NSNumber]
    public let dataType: MLMultiArrayDataType
    public let shapeConstraint: MLMultiArrayShapeConstraint

    /// `shapes` are all that are allowed, where there are several; `shape` is the default.
    init(shape: [NSNumber], dataType: MLMultiArrayDataType, shapes: [[NSNumber]] = []) {
        self.shape = shape
        self.dataType = dataType
        shapeConstraint = MLMultiArrayShapeConstraint(shapes: shapes.isEmpty ? [shape] : shapes)
    }
}

public final class MLFeatureDescription {
    public let name: String
    public let type = MLFeatureType.multiArray
    public let isOptional = false
    public let multiArrayConstraint: MLMultiArrayConstraint?

    init(name: String, constraint: MLMultiArrayConstraint) {
        self.name = name
        multiArrayConstraint = constraint
    }
}

/// What a model's author may have written into it. The raw values are Core ML's.
public struct MLModelMetadataKey: RawRepresentable, Hashable, Sendable {
    public static let description = Self(rawValue: "MLModelDescriptionKey")
    public static let versionString = Self(rawValue: "MLModelVersionStringKey")
    public static let author = Self(rawValue: "MLModelAuthorKey")
    public static let license = Self(rawValue: "MLModelLicenseKey")
    /// A `[String: String]` of whatever else there is.
    public static let creatorDefinedKey = Self(rawValue: "MLModelCreatorDefinedKey")

    public let rawValue: String
    public init(rawValue: String) { self.rawValue = rawValue }
}

public final class MLModelDescription {
    public let inputDescriptionsByName: [String: MLFeatureDescription]
    public let outputDescriptionsByName: [String: MLFeatureDescription]
    /// All keys are there, as in Core ML: a text that was left out is empty.
    public let metadata: [MLModelMetadataKey: Any]

    init(inputs: [MLFeatureDescription], outputs: [MLFeatureDescription], metadata: [MLModelMetadataKey: Any]) {
        self.metadata = metadata
        inputDescriptionsByName = Dictionary(uniqueKeysWithValues: inputs.map { ($0.name, $0) })
        outputDescriptionsByName = Dictionary(uniqueKeysWithValues: outputs.map { ($0.name, $0) })
    }
}

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

/// Hints for Core ML, which change no result: the stand-in has nothing to do with them.
public struct MLOptimizationHints: Equatable, Sendable {
    public enum ReshapeFrequency: Int, Sendable {
        case frequent = 0
        case infrequent = 1
    }

    public enum SpecializationStrategy: Int, Sendable {
        case `default` = 0
        case fastPrediction = 1
    }

    public var reshapeFrequency = ReshapeFrequency.frequent
    public var specializationStrategy = SpecializationStrategy.default

    public init() {}
}

public final class MLModelConfiguration {
    public var computeUnits = MLComputeUnits.all
    public var optimizationHints = MLOptimizationHints()
    public var functionName: String?

    public init() {}
}

public final class MLPredictionOptions {
    public init() {}
}
