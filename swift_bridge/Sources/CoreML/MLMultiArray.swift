import Foundation

/// What a model's values are made of. The raw values are Core ML's.
public enum MLMultiArrayDataType: Int, Sendable {
    case double = 65600
    case float32 = 65568
    case float16 = 65552
    case int32 = 131104

    public static var float: MLMultiArrayDataType { .float32 }

    var size: Int {
        switch self {
        case .double: 8
        case .float32, .int32: 4
        case .float16: 2
        }
    }

    var numpyName: String {
        switch self {
        case .double: "float64"
        case .float32: "float32"
        case .float16: "float16"
        case .int32: "int32"
        }
    }

    init?(numpyName: String) {
        guard let found = [Self.double, .float32, .float16, .int32].first(where: { $0.numpyName == numpyName })
        else { return nil }
        self = found
    }
}

/// Numbers of one type in any number of dimensions. Rows may have gaps between them: read `strides`.
public final class MLMultiArray {
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    private let storage: UnsafeMutableRawPointer
    private let byteCount: Int

    /// Zeros.
    public convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        try self.init(shape: shape, dataType: dataType, alignment: 1)
    }

    /// Zeros, each row of which begins at a multiple of `alignment` bytes.
    convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType, alignment: Int) throws {
        guard shape.allSatisfy({ $0.intValue > 0 }) else {
            throw MLModelError(.generic, "a multi-array of shape \(shape): expected positive sizes")
        }
        self.init(contiguous: shape.map(\.intValue), dataType, alignment: alignment)
    }

    init(contiguous sizes: [Int], _ dataType: MLMultiArrayDataType, alignment: Int = 1) {
        let shape = sizes.map { NSNumber(value: $0) }
        var stride = 1
        var strides: [NSNumber] = []
        for (back, size) in shape.reversed().enumerated() {
            strides.insert(NSNumber(value: stride), at: 0)
            stride *= size.intValue
            if back == 0, shape.count > 1 {
                let unit = max(alignment / dataType.size, 1)
                stride = (stride + unit - 1) / unit * unit
            }
        }
        self.shape = shape
        self.strides = strides
        self.dataType = dataType
        byteCount = max(stride, 1) * dataType.size
        storage = .allocate(byteCount: byteCount, alignment: 64)
        storage.initializeMemory(as: UInt8.self, repeating: 0, count: byteCount)
    }

    deinit { storage.deallocate() }

    /// How many numbers there are, gaps not counted.
    public var count: Int { shape.reduce(1) { $0 * $1.intValue } }

    public func withUnsafeBytes<Result>(_ body: (UnsafeRawBufferPointer) throws -> Result) rethrows -> Result {
        try body(UnsafeRawBufferPointer(start: storage, count: byteCount))
    }

    public func withUnsafeMutableBytes<Result>(
        _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> Result
    ) rethrows -> Result {
        try body(UnsafeMutableRawBufferPointer(start: storage, count: byteCount), strides.map(\.intValue))
    }

    /// The number at a position in row-major order.
    public subscript(index: Int) -> NSNumber {
        get { NSNumber(value: double(at: offset(index))) }
        set { set(newValue.doubleValue, at: offset(index)) }
    }

    private func offset(_ index: Int) -> Int {
        precondition((0..<count).contains(index), "index \(index) of a multi-array of \(count)")
        var (rest, offset) = (index, 0)
        for (size, stride) in zip(shape, strides).reversed() {
            offset += rest % size.intValue * stride.intValue
            rest /= size.intValue
        }
        return offset * dataType.size
    }

    private func double(at offset: Int) -> Double {
        switch dataType {
        case .double: storage.load(fromByteOffset: offset, as: Double.self)
        case .float32: Double(storage.load(fromByteOffset: offset, as: Float.self))
        case .float16: Double(storage.load(fromByteOffset: offset, as: Float16.self))
        case .int32: Double(storage.load(fromByteOffset: offset, as: Int32.self))
        }
    }

    private func set(_ value: Double, at offset: Int) {
        switch dataType {
        case .double: storage.storeBytes(of: value, toByteOffset: offset, as: Double.self)
        case .float32: storage.storeBytes(of: Float(value), toByteOffset: offset, as: Float.self)
        case .float16: storage.storeBytes(of: Float16(value), toByteOffset: offset, as: Float16.self)
        case .int32: storage.storeBytes(of: Int32(value), toByteOffset: offset, as: Int32.self)
        }
    }

    /// The numbers without gaps, as another type where that is asked for.
    func packed(as type: MLMultiArrayDataType) throws -> Data {
        let plain = try MLMultiArray(shape: shape, dataType: type)
        if isContiguous, type == dataType { return Data(bytes: storage, count: count * dataType.size) }
        for index in 0..<count { plain.set(double(at: offset(index)), at: index * type.size) }
        return Data(bytes: plain.storage, count: count * type.size)
    }

    /// Fill with numbers of the own type that have no gaps between them.
    func unpack(_ data: Data) {
        let row = (shape.last?.intValue ?? 1) * dataType.size
        data.withUnsafeBytes { source in
            for start in stride(from: 0, to: count * dataType.size, by: row) {
                guard let base = source.baseAddress else { return }
                (storage + offset(start / dataType.size)).copyMemory(from: base + start, byteCount: row)
            }
        }
    }

    private var isContiguous: Bool {
        var expected = 1
        for (size, stride) in zip(shape, strides).reversed() {
            if stride.intValue != expected { return false }
            expected *= size.intValue
        }
        return true
    }
}
