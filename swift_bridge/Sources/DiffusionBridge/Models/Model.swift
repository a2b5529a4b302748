/// What a model takes or gives.
struct TensorSpec: Sendable, Equatable {
    let name: String
    let shape: [Int]
}

/// A loaded model: tensors in by name, tensors out by name.
protocol Model: Sendable {
    var inputs: [String: TensorSpec] { get }
    var outputs: [String: TensorSpec] { get }
    /// Run once. Throws for a missing, unknown or mis-shaped tensor, naming expected and got.
    func predict(_ tensors: [String: Tensor]) async throws -> [String: Tensor]
}

extension Model {
    /// Throw one error that lists every missing, unknown and mis-shaped tensor.
    func check(_ tensors: [String: Tensor], _ name: String) throws {
        var wrong = inputs.keys.filter { tensors[$0] == nil }.sorted().map { "missing \($0)" }
        wrong += tensors.keys.filter { inputs[$0] == nil }.sorted().map { "unknown \($0)" }
        for (name, spec) in inputs.sorted(by: { $0.key < $1.key }) {
            guard let tensor = tensors[name], tensor.shape != spec.shape else { continue }
            wrong.append("\(name) has shape \(tensor.shape), expected \(spec.shape)")
        }
        guard wrong.isEmpty else {
            throw DiffusionError.input(
                "\(name): \(wrong.joined(separator: "; ")) (inputs: \(inputs.keys.sorted().joined(separator: ", ")))")
        }
    }
}

/// Models that run one after the other as one, as the chunks of a UNet do: what an earlier one gives is, by its name,
/// what a later one takes. The last one's outputs are the chain's.
struct Chain: Model {
    let links: [any Model]
    let inputs: [String: TensorSpec]

    init(_ links: [any Model]) {
        self.links = links
        var needed: [String: TensorSpec] = [:]
        var given: Set<String> = []
        for link in links {
            needed.merge(link.inputs.filter { !given.contains($0.key) }) { first, _ in first }
            given.formUnion(link.outputs.keys)
        }
        inputs = needed
    }

    var outputs: [String: TensorSpec] { links.last?.outputs ?? [:] }

    func predict(_ tensors: [String: Tensor]) async throws -> [String: Tensor] {
        try check(tensors, "chunked model")
        var values = tensors
        var results: [String: Tensor] = [:]
        for link in links {
            results = try await link.predict(values.filter { link.inputs[$0.key] != nil })
            values.merge(results) { $1 }
        }
        return results
    }
}
