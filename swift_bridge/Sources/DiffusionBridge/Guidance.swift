import Foundation

/// Classifier-free guidance (Ho and Salimans, 2022, equation 6) through a UNet of any fixed batch size.
///
/// A row is one picture with one text. Guided, a picture has two rows, the unconditional text first; else one. Rows are
/// filled into calls of the UNet's batch size in this order, the last call with repetitions.
struct Guidance {
    /// What the UNet is given besides latents and timestep.
    struct Conditions {
        /// One value per row, by the input's name.
        var rows: [String: Tensor]
        /// What is concatenated to the latents: (pictures or 1, channels, height, width).
        var channels: Tensor?
    }

    private let unet: NamedModel
    private let scale: Float
    private let isGuided: Bool
    private let calls: [Call]
    private let channels: Tensor?
    private let rows: Int

    private struct Call {
        /// The pictures of this call's rows.
        let pictures: [Int]
        let constant: [String: Tensor]
    }

    static func isGuided(_ scale: Double) -> Bool { scale > 1 }

    /// What a UNet with `timestep_cond` is told of the guidance scale: sines, then cosines, of 1000 (scale - 1) at falling
    /// frequencies (Luo et al., Latent Consistency Models, as diffusers has it).
    static func embedding(_ scale: Double, width: Int) -> [Float] {
        let half = width / 2
        let angles = (0..<half).map { index in
            1000 * (Float(scale) - 1) * exp(Float(index) * -Float(log(10000.0) / Double(half - 1)))
        }
        return angles.map { sin($0) } + angles.map { cos($0) } + [Float](repeating: 0, count: width % 2)
    }

    init(_ unet: NamedModel, pictures: Int, _ conditions: Conditions, scale: Double) throws {
        self.unet = unet
        self.scale = Float(scale)
        isGuided = Self.isGuided(scale)
        channels = conditions.channels
        let perPicture = isGuided ? 2 : 1
        rows = pictures * perPicture
        let filled = Set(conditions.rows.keys).union(["sample", "timestep"])
        let unknown = unet.inputs.keys.filter { !filled.contains($0) }.sorted()
        let missing = filled.filter { unet.inputs[$0] == nil }.sorted()
        guard unknown.isEmpty, missing.isEmpty, let batch = unet.inputs["sample"]?.shape.first, batch > 0 else {
            var parts = unknown.isEmpty ? [] : ["nothing is known to fill \(unknown.joined(separator: ", "))"]
            if !missing.isEmpty { parts.append("it has no place for \(missing.joined(separator: ", "))") }
            throw DiffusionError.input(
                "unet: takes \(unet.inputs.keys.sorted().joined(separator: ", ")); \(parts.joined(separator: "; "))")
        }
        let last = rows - 1
        calls = stride(from: 0, to: rows, by: batch).map { start in
            let chosen = (start..<start + batch).map { min($0, last) }
            let constant = conditions.rows.mapValues { values in
                Tensor.concatenated(chosen.map { values.rows($0..<$0 + 1) })
            }
            return Call(pictures: chosen.map { $0 / perPicture }, constant: constant)
        }
    }

    /// What the UNet predicts for the latents of all pictures.
    func predict(_ latents: Tensor, _ timestep: Double) async throws -> Tensor {
        var outputs: [Tensor] = []
        for call in calls {
            var tensors = call.constant
            tensors["sample"] = sample(latents, call.pictures)
            tensors["timestep"] = Tensor(repeating: Float(timestep), shape: [call.pictures.count])
            outputs.append(try await unet.one("noise_pred", tensors))
        }
        let together = outputs.count == 1 ? outputs[0] : Tensor.concatenated(outputs)
        let predicted = together.shape[0] == rows ? together : together.rows(0..<rows)
        return isGuided ? guided(predicted) : predicted
    }

    private func sample(_ latents: Tensor, _ pictures: [Int]) -> Tensor {
        let size = latents.rowCount
        let extra = channels?.rowCount ?? 0
        var values: [Float] = []
        values.reserveCapacity(pictures.count * (size + extra))
        for picture in pictures {
            values += latents.values[picture * size..<(picture + 1) * size]
            guard let channels else { continue }
            let row = channels.shape[0] > 1 ? picture : 0
            values += channels.values[row * extra..<(row + 1) * extra]
        }
        let depth = latents.shape[1] + (channels?.shape[1] ?? 0)
        return Tensor(shape: [pictures.count, depth] + latents.shape.dropFirst(2), values: values)
    }

    private func guided(_ predicted: Tensor) -> Tensor {
        let size = predicted.rowCount
        let count = predicted.shape[0] / 2
        let values = [Float](unsafeUninitializedCapacity: count * size) { buffer, initialized in
            predicted.values.withUnsafeBufferPointer { source in
                for picture in 0..<count {
                    let start = 2 * picture * size
                    for index in 0..<size {
                        let plain = source[start + index]
                        buffer[picture * size + index] = plain + scale * (source[start + size + index] - plain)
                    }
                }
            }
            initialized = count * size
        }
        return Tensor(shape: [count] + predicted.shape.dropFirst(), values: values)
    }
}
