/// Standard normal float32 values; every call draws the next ones.
protocol NormalSource {
    mutating func normal(_ count: Int) -> [Float]
}

/// Whose random numbers a seed stands for. The same seed and source give the same picture on every machine.
public enum RandomSource: String, Sendable, CaseIterable {
    /// As diffusers draws on the CPU.
    case torch
    /// As the Python client of Apple's ml-stable-diffusion draws.
    case numpy
    /// As torch draws on an NVIDIA GPU.
    case nvidia

    func seeded(_ seed: UInt64) -> any NormalSource {
        switch self {
        case .torch: TorchNormal(seed: UInt32(truncatingIfNeeded: seed))  // all that torch's generator takes
        case .numpy: NumPyNormal(seed: UInt32(truncatingIfNeeded: seed))
        case .nvidia: NvidiaNormal(seed: seed)
        }
    }
}

/// One source for all pictures of a run, or one for each of them: then each picture depends on its own seed alone.
struct Noise {
    private var sources: [any NormalSource]

    init(seeds: [UInt64], source: RandomSource) {
        sources = seeds.map(source.seeded)
    }

    var isPerPicture: Bool { sources.count > 1 }

    /// Standard normal values of a shape, whose first dimension is the number of pictures where each has a source.
    mutating func normal(_ shape: [Int]) throws -> Tensor {
        let count = shape.reduce(1, *)
        guard isPerPicture else { return Tensor(shape: shape, values: sources[0].normal(count)) }
        guard shape.first == sources.count else {
            throw DiffusionError.input("\(sources.count) seeds for \(shape.first ?? 0) pictures: give one, or one each")
        }
        var values: [Float] = []
        values.reserveCapacity(count)
        for index in sources.indices { values += sources[index].normal(count / sources.count) }
        return Tensor(shape: shape, values: values)
    }
}
