/// Float32 values in row-major order, contiguous.
public struct Tensor: Sendable, Equatable {
    /// The size of each dimension.
    public let shape: [Int]
    /// As many as the product of `shape`.
    public var values: [Float]

    /// A tensor of values in row-major order; their number must be the product of `shape`.
    public init(shape: [Int], values: [Float]) {
        precondition(values.count == shape.reduce(1, *), "\(values.count) values for the shape \(shape)")
        self.shape = shape
        self.values = values
    }

    init(repeating value: Float, shape: [Int]) {
        self.init(shape: shape, values: [Float](repeating: value, count: shape.reduce(1, *)))
    }

    /// How many values one entry of the first dimension has.
    var rowCount: Int { shape.dropFirst().reduce(1, *) }

    /// The entries of the first dimension in a range.
    func rows(_ range: Range<Int>) -> Tensor {
        let size = rowCount
        let chosen = values[range.lowerBound * size..<range.upperBound * size]
        return Tensor(shape: [range.count] + shape.dropFirst(), values: Array(chosen))
    }

    /// One entry of the first dimension, repeated where the tensor holds one for all.
    func repeated(_ count: Int) -> Tensor {
        guard shape.first != count else { return self }
        return Tensor(
            shape: [count] + shape.dropFirst(), values: Array((0..<count).map { _ in values }.joined()))
    }

    /// Several tensors set one after the other along the first dimension.
    static func concatenated(_ parts: [Tensor]) -> Tensor {
        let rows = parts.reduce(0) { $0 + ($1.shape.first ?? 0) }
        let inner = parts.first.map { Array($0.shape.dropFirst()) } ?? []
        return Tensor(shape: [rows] + inner, values: parts.flatMap(\.values))
    }

    /// Whether no value is NaN or infinite.
    var isFinite: Bool {
        // A sum over numbers is a number unless one of them is none; float32 values cannot overflow in a double.
        values.reduce(0.0) { $0 + Double($1) }.isFinite
    }

    /// `a * self + b * other`, value by value.
    func combined(_ a: Float, _ b: Float, _ other: Tensor) -> Tensor {
        Tensor.combination([(a, self), (b, other)])
    }

    /// Every value changed by a function.
    func mapped(_ change: (Float) -> Float) -> Tensor {
        Tensor(shape: shape, values: values.map(change))
    }

    /// No value farther from 0 than `limit`, where there is one.
    func clipped(_ limit: Float?) -> Tensor {
        guard let limit else { return self }
        return mapped { min(max($0, -limit), limit) }
    }

    /// The sum of tensors of one shape, each times its factor.
    static func combination(_ terms: [(Float, Tensor)]) -> Tensor {
        let shape = terms[0].1.shape
        let count = terms[0].1.values.count
        let values = [Float](unsafeUninitializedCapacity: count) { buffer, initialized in
            for (position, (factor, tensor)) in terms.enumerated() {
                tensor.values.withUnsafeBufferPointer { source in
                    if position == 0 {
                        for index in 0..<count { buffer[index] = factor * source[index] }
                    } else {
                        for index in 0..<count { buffer[index] += factor * source[index] }
                    }
                }
            }
            initialized = count
        }
        return Tensor(shape: shape, values: values)
    }
}

extension Tensor {
    /// Whether both hold the same memory, which is quicker to see than that they are equal.
    func shares(_ other: Tensor) -> Bool {
        shape == other.shape
            && values.withUnsafeBufferPointer { own in
                other.values.withUnsafeBufferPointer { $0.baseAddress == own.baseAddress }
            }
    }
}
