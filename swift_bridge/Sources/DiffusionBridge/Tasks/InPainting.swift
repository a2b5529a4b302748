/// Painting anew where the mask is white: with a UNet that sees mask and surroundings, or by blending latents.
extension Job {
    /// For a UNet with 9 channels: latents, mask, latents of the picture with the masked part grey.
    mutating func inPainting() async throws -> Prepared {
        let (image, mask) = try imageAndMask()
        let calls = try calls()
        let clean = strength == 1 ? nil : try await encode(image)
        let (latents, _) = try firstLatents(clean, calls)
        var hidden = image
        let size = mask.values.count
        for index in hidden.values.indices where mask.values[index % size] == 1 { hidden.values[index] = 0 }
        let surroundings = try await encode(hidden)
        await pipeline.models.release("vae_encoder")
        let small = small(mask)
        let rows = (0..<surroundings.shape[0]).flatMap { small.values + surroundings.rows($0..<$0 + 1).values }
        let shape = [surroundings.shape[0], surroundings.shape[1] + 1] + surroundings.shape.dropFirst(2)
        return Prepared(latents: latents, calls: calls, channels: Tensor(shape: shape, values: rows))
    }

    /// For a plain UNet: after every step the part that stays is replaced by the picture at that noise level.
    mutating func blending() async throws -> Prepared {
        let (image, mask) = try imageAndMask()
        let calls = try calls()
        let clean = try await encode(image)
        await pipeline.models.release("vae_encoder")
        let (latents, drawn) = try firstLatents(clean, calls)
        // diffusers encodes the masked picture here too and throws it away. Drawing what that draws keeps the noise of
        // later steps the same, where a scheduler draws any.
        _ = try noise.normal(clean.shape)
        let blend = Blend(clean: clean.repeated(request.count), noise: drawn, mask: small(mask))
        return Prepared(latents: latents, calls: calls, blend: blend)
    }

    /// The picture in -1..1, and the mask (1, 1, height, width): 1 is painted anew.
    mutating func imageAndMask() throws -> (Tensor, Tensor) {
        let image = try image()
        guard let given = request.mask else {
            throw DiffusionError.input("in-painting needs a mask: white marks what to paint anew")
        }
        let mask = resized(given.grey, "mask", (image.height, image.width))
        let values = stride(from: 0, to: mask.bytes.count, by: 3).map { mask.bytes[$0] >= 128 ? Float(1) : 0 }
        guard values.contains(1) else {
            throw DiffusionError.input(
                "the mask is black all over, so nothing would change: white marks what to paint anew")
        }
        return (image.tensor, Tensor(shape: [1, 1, mask.height, mask.width], values: values))
    }

    /// Pure noise at full strength, else the noised picture; and the noise itself.
    private mutating func firstLatents(_ clean: Tensor?, _ calls: Range<Int>) throws -> (Tensor, Tensor) {
        let drawn = try noise.normal(latentShape)
        guard strength < 1, let clean else {
            let factor = scheduler.initialNoise
            return (drawn.mapped { $0 * factor }, drawn)
        }
        return (scheduler.noised(clean.repeated(request.count), drawn, at: calls.lowerBound), drawn)
    }

    /// The mask in the size of latents: of each square its upper left pixel, as torch's nearest neighbour.
    private func small(_ mask: Tensor) -> Tensor {
        let (height, width) = latentSize
        let factor = pipeline.manifest.latents.factor
        let values = (0..<height * width).map { place in
            mask.values[place / width * factor * mask.shape[3] + place % width * factor]
        }
        return Tensor(shape: [1, 1, height, width], values: values)
    }
}
