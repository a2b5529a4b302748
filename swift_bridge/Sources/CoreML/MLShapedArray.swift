import Foundation

/// What a shaped array may be made of.
public protocol MLShapedArrayScalar: Sendable {
    static var multiArrayDataType: MLMultiArrayDataType { get }
    static func made(of number: Double) -> Self
    var asDouble: Double { get }
}

extension Double: MLShapedArrayScalar {
    public static var multiArrayDataType: MLMultiArrayDataType { .double }
    public static func made(of number: Double) -> Self { number }
    public var asDouble: Double { self }
}

extension Float: MLShapedArrayScalar {
    public static var multiArrayDataType: MLMultiArrayDataType { .float32 }
    public static func made(of number: Double) -> Self { Self(number) }
    public var asDouble: Double { Double(self) }
}

extension Float16: MLShapedArrayScalar {
    public static var multiArrayDataType: MLMultiArrayDataType { .float16 }
    public static func made(of number: Double) -> Self { Self(number) }
    public var asDouble: Double { Double(self) }
}

extension Int32: MLShapedArrayScalar {
    public static var multiArrayDataType: MLMultiArrayDataType { .int32 }
    public static func made(of number: Double) -> Self { Self(number) }
    public var asDouble: Double { Double(self) }
}

/// Numbers of a type that the compiler knows, in any number of dimensions, row-major and without gaps. Traps where the
/// number of scalars is not that of the shape, as Core ML's does.
public struct MLShapedArray<Scalar: MLShapedArrayScalar>: Sendable {
    public let shape: [Int]
    public let scalars: [Scalar]

    public init(scalars: some Sequence<Scalar>, shape: [Int]) {
        self.scalars = Array(scalars)
        self.shape = shape
        precondition(
            self.scalars.count == shape.reduce(1, *), "\(self.scalars.count) scalars for a shaped array of shape \(shape)")
    }

    public init(repeating value: Scalar, shape: [Int]) {
        self.init(scalars: repeatElement(value, count: shape.reduce(1, *)), shape: shape)
    }

    /// From the bytes of row-major scalars.
    public init(data: Data, shape: [Int]) {
        let count = shape.reduce(1, *)
        precondition(
            data.count == count * MemoryLayout<Scalar>.stride, "\(data.count) bytes for a shaped array of shape \(shape)")
        self.init(
            scalars: data.withUnsafeBytes { bytes in
                (0..<count).map { bytes.loadUnaligned(fromByteOffset: $0 * MemoryLayout<Scalar>.stride, as: Scalar.self) }
            }, shape: shape)
    }

    /// The numbers of a multi-array of the same type. Traps for another: it would be read as what it is not.
    public init(_ array: MLMultiArray) {
        precondition(
            array.dataType == Scalar.multiArrayDataType,
            "a multi-array of \(array.dataType) as a shaped array of \(Scalar.self): use init(converting:)")
        self.init(converting: array)
    }

    /// The numbers of a multi-array of any type.
    public init(converting array: MLMultiArray) {
        self.init(
            scalars: (0..<array.count).map { Scalar.made(of: array[$0].doubleValue) },
            shape: array.shape.map(\.intValue))
    }

    public var count: Int { scalars.count }
    public var strides: [Int] { shape.indices.map { shape[($0 + 1)...].reduce(1, *) } }

    public func withUnsafeShapedBufferPointer<Result>(
        _ body: (UnsafeBufferPointer<Scalar>, [Int], [Int]) throws -> Result
    ) rethrows -> Result {
        try scalars.withUnsafeBufferPointer { try body($0, shape, strides) }
    }
}

extension MLMultiArray {
    /// The numbers of a shaped array.
    public convenience init<Scalar>(_ array: MLShapedArray<Scalar>) {
        self.init(contiguous: array.shape, Scalar.multiArrayDataType)
        for (index, scalar) in array.scalars.enumerated() { self[index] = NSNumber(value: scalar.asDouble) }
    }

    /// Multi-arrays one after the other along an axis. Traps where their other sizes differ, as Core ML's does.
    public convenience init(concatenating arrays: [MLMultiArray], axis: Int, dataType: MLMultiArrayDataType) {
        let shapes = arrays.map { $0.shape.map(\.intValue) }
        precondition(!shapes.isEmpty && shapes.allSatisfy { $0.indices.contains(axis) }, "no axis \(axis) in \(shapes)")
        var shape = shapes[0]
        precondition(
            shapes.allSatisfy { other in
                other.count == shape.count && shape.indices.allSatisfy { $0 == axis || other[$0] == shape[$0] }
            }, "shapes \(shapes) differ beside axis \(axis)")
        shape[axis] = shapes.reduce(0) { $0 + $1[axis] }
        self.init(contiguous: shape, dataType)
        let outer = shape[..<axis].reduce(1, *)
        let inner = shape[(axis + 1)...].reduce(1, *)
        var start = 0
        for (array, own) in zip(arrays, shapes) {
            let run = own[axis] * inner
            for row in 0..<outer {
                for index in 0..<run { self[row * shape[axis] * inner + start + index] = array[row * run + index] }
            }
            start += run
        }
    }
}
