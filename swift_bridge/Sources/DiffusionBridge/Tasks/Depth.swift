import Foundation

/// From a picture whose depth is kept: the UNet sees a depth map as a fifth channel.
extension Job {
    /// (1, 1, height, width) of latents in -1..1, nearer larger: the depth that was given, else estimated.
    mutating func depthChannel() async throws -> Tensor {
        let depth = if let given = request.depth { given } else { try await estimated() }
        let (height, width) = latentSize
        let small = depth.resized(width, height)
        guard let nearest = small.max(), let farthest = small.min(), nearest.isFinite, nearest > farthest else {
            throw DiffusionError.input(
                "the depth is the same all over: expected a picture that is brighter where things are nearer")
        }
        return Tensor(
            shape: [1, 1, height, width], values: small.map { 2 * ($0 - farthest) / (nearest - farthest) - 1 })
    }

    /// What the converted estimator says of the picture in -1..1, resized to its own size bicubically.
    private func estimated() async throws -> DepthMap {
        let estimator = try await pipeline.models.model("depth_estimator")
        guard let (name, spec) = estimator.inputs.first, spec.shape.count == 4, let image = request.image else {
            throw DiffusionError.package("depth_estimator: expected one input, a picture")
        }
        let pixels = image.resized(spec.shape[3], spec.shape[2], .bicubic).tensor
        let values = try await estimator.one("predicted_depth", [name: pixels])
        await pipeline.models.release("depth_estimator")
        guard values.shape.count >= 2 else {
            throw DiffusionError.package("depth_estimator: gave shape \(values.shape), expected a map of depths")
        }
        let (height, width) = (values.shape[values.shape.count - 2], values.shape[values.shape.count - 1])
        return try DepthMap(width: width, height: height, values: values.values)
    }
}

extension DepthMap {
    /// The values in another size by cubic interpolation without smoothing, as torch's `interpolate` has it.
    func resized(_ newWidth: Int, _ newHeight: Int) -> [Float] {
        let rows = Cubic.taps(from: height, to: newHeight)
        let columns = Cubic.taps(from: width, to: newWidth)
        var made: [Float] = []
        made.reserveCapacity(newWidth * newHeight)
        for row in rows {
            for column in columns {
                var sum: Float = 0
                for (line, share) in zip(row.places, row.weights) {
                    var inner: Float = 0
                    for (place, weight) in zip(column.places, column.weights) {
                        inner += values[line * width + place] * weight
                    }
                    sum += inner * share
                }
                made.append(sum)
            }
        }
        return made
    }
}

/// Keys' cubic convolution with a = -0.75, of four neighbours; beyond the border the outermost is repeated.
private enum Cubic {
    static func taps(from old: Int, to new: Int) -> [(places: [Int], weights: [Float])] {
        let scale = Float(old) / Float(new)
        return (0..<new).map { index in
            let place = (Float(index) + 0.5) * scale - 0.5
            let whole = place.rounded(.down)
            let rest = place - whole
            let weights = [outer(rest + 1), inner(rest), inner(1 - rest), outer(2 - rest)]
            return ((-1...2).map { min(max(Int(whole) + $0, 0), old - 1) }, weights)
        }
    }

    private static let a: Float = -0.75
    private static func inner(_ x: Float) -> Float { ((a + 2) * x - (a + 3)) * x * x + 1 }
    private static func outer(_ x: Float) -> Float { ((a * x - 5 * a) * x + 8 * a) * x - 4 * a }
}
