/// What the numbers in a model's memory are made of.
enum Element: Sendable {
    case float16, float32, double, int32
}

/// How the numbers of an array lie in memory: their type, and how far apart neighbours along each dimension are. The
/// Neural Engine leaves gaps between rows.
struct Layout: Sendable {
    let shape: [Int]
    let strides: [Int]
    let element: Element

    var count: Int { shape.reduce(1, *) }

    /// Write values in row-major order into memory.
    func write(_ values: [Float], to bytes: UnsafeMutableRawBufferPointer) {
        guard let base = bytes.baseAddress else { return }
        values.withUnsafeBufferPointer { source in
            forEachRun { start, place, count in
                guard let from = source.baseAddress?.advanced(by: start) else { return }
                Self.write(from, count, to: base, at: place, element)
            }
        }
    }

    /// The values in memory, in row-major order.
    func read(_ bytes: UnsafeRawBufferPointer) -> [Float] {
        [Float](unsafeUninitializedCapacity: count) { buffer, initialized in
            forEachRun { start, place, count in
                guard let base = bytes.baseAddress, let to = buffer.baseAddress?.advanced(by: start) else { return }
                Self.read(base, at: place, count, to: to, element)
            }
            initialized = count
        }
    }

    // One loop for each type, without a decision in it, so that the compiler makes it of vector instructions.

    private static func write(
        _ from: UnsafePointer<Float>, _ count: Int, to base: UnsafeMutableRawPointer, at place: Int, _ element: Element
    ) {
        switch element {
        case .float16:
            let to = base.assumingMemoryBound(to: UInt16.self) + place
            for index in 0..<count { to[index] = Half.bits(from[index]) }
        case .float32:
            let to = base.assumingMemoryBound(to: Float.self) + place
            for index in 0..<count { to[index] = from[index] }
        case .double:
            let to = base.assumingMemoryBound(to: Double.self) + place
            for index in 0..<count { to[index] = Double(from[index]) }
        case .int32:
            let to = base.assumingMemoryBound(to: Int32.self) + place
            for index in 0..<count { to[index] = Int32(from[index]) }
        }
    }

    private static func read(
        _ base: UnsafeRawPointer, at place: Int, _ count: Int, to: UnsafeMutablePointer<Float>, _ element: Element
    ) {
        switch element {
        case .float16:
            let from = base.assumingMemoryBound(to: UInt16.self) + place
            for index in 0..<count { to[index] = Half.float(from[index]) }
        case .float32:
            let from = base.assumingMemoryBound(to: Float.self) + place
            for index in 0..<count { to[index] = from[index] }
        case .double:
            let from = base.assumingMemoryBound(to: Double.self) + place
            for index in 0..<count { to[index] = Float(from[index]) }
        case .int32:
            let from = base.assumingMemoryBound(to: Int32.self) + place
            for index in 0..<count { to[index] = Float(from[index]) }
        }
    }

    /// Runs of neighbours: where each starts among all values, where in memory, and how long it is.
    private func forEachRun(_ body: (Int, Int, Int) -> Void) {
        var dimensions = shape.count
        var length = 1
        while dimensions > 0, strides[dimensions - 1] == length || shape[dimensions - 1] == 1 {
            dimensions -= 1
            length *= shape[dimensions]
        }
        for run in 0..<shape[..<dimensions].reduce(1, *) {
            var (rest, place) = (run, 0)
            for index in (0..<dimensions).reversed() {
                place += rest % shape[index] * strides[index]
                rest /= shape[index]
            }
            body(run * length, place, length)
        }
    }
}
