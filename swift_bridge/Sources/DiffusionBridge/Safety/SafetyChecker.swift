/// Preprocessing for the safety checker, and reading its verdict.
enum SafetyChecker {
    private static let mean: [Float] = [0.48145466, 0.4578275, 0.40821073]
    private static let deviation: [Float] = [0.26862954, 0.26130258, 0.27577711]

    /// Whether a checker flags a picture. Its `images` input only passes through, so a checker converted for another
    /// size still judges: it is then handed zeros.
    static func isFlagged(_ picture: Picture, by checker: NamedModel) async throws -> Bool {
        guard let side = checker.inputs["clip_input"]?.shape.last else {
            throw DiffusionError.package("safety_checker: has no input clip_input")
        }
        var tensors = checker.inputs.mapValues { Tensor(repeating: 0, shape: $0.shape) }
        if tensors["images"]?.shape == [1, picture.height, picture.width, 3] {
            tensors["images"] = Tensor(
                shape: [1, picture.height, picture.width, 3], values: picture.bytes.map { Float($0) / 255 })
        }
        tensors["clip_input"] = clipInput(picture, side)
        return try await checker.one("has_nsfw_concepts", tensors).values.contains { $0 != 0 }
    }

    /// What CLIP's image processor makes of a picture: the shorter edge to `side` by bicubic interpolation, the centre
    /// cut out, CLIP's mean and deviation.
    static func clipInput(_ picture: Picture, _ side: Int) -> Tensor {
        let short = min(picture.width, picture.height)
        let resized = picture.resized(side * picture.width / short, side * picture.height / short, .bicubic)
        let (left, top) = ((resized.width - side) / 2, (resized.height - side) / 2)
        var values: [Float] = []
        for channel in 0..<3 {
            for row in top..<top + side {
                for column in left..<left + side {
                    let byte = resized.bytes[3 * (row * resized.width + column) + channel]
                    values.append((Float(byte) / 255 - mean[channel]) / deviation[channel])
                }
            }
        }
        return Tensor(shape: [1, 3, side, side], values: values)
    }
}
