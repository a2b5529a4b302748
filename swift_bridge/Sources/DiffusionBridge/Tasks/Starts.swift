/// From noise alone, or from latents that are given.
extension Job {
    mutating func textToImage() throws -> Prepared {
        let calls = try calls()
        if request.denoisingStart != nil, let latents = request.latents {
            return Prepared(latents: latents, calls: calls)
        }
        return Prepared(latents: try noiseLatents(), calls: calls)
    }

    /// Noise at the scheduler's first level: the caller's, else drawn.
    private mutating func noiseLatents() throws -> Tensor {
        let factor = scheduler.initialNoise
        return try (request.latents ?? noise.normal(latentShape)).mapped { $0 * factor }
    }
}

/// From a picture, noised as far as the strength says (SDEdit, Meng et al. 2022).
extension Job {
    mutating func imageToImage() async throws -> Prepared {
        let calls = try calls()
        let clean = try await encode(image().tensor).repeated(request.count)
        await pipeline.models.release("vae_encoder")
        let drawn = try noise.normal(latentShape)
        return Prepared(latents: scheduler.noised(clean, drawn, at: calls.lowerBound), calls: calls)
    }
}

/// Four times larger: the UNet sees the small picture, slightly noised, beside the latents.
extension Job {
    private static let mostNoise = 350  // what stabilityai/stable-diffusion-x4-upscaler was trained with
    static let usualNoise = 20

    private var level: Int { request.noiseLevel ?? Self.usualNoise }

    mutating func checkUpscaling() throws {
        _ = try image()
        guard (0...Self.mostNoise).contains(level) else {
            throw DiffusionError.input("noise level \(level): expected 0 to \(Self.mostNoise)")
        }
        _ = try noiseTable()
    }

    mutating func upscaling() throws -> Prepared {
        let small = try image().tensor
        let count = noise.isPerPicture ? request.count : 1
        let drawn = try noise.normal([count] + small.shape.dropFirst())
        let noised = mixed(small.repeated(count), drawn, alpha: try noiseTable().alphas[level])
        return Prepared(
            latents: try noiseLatents(), calls: 0..<scheduler.timesteps.count, channels: noised,
            labels: ["class_labels": Float(level)])
    }

    private func noiseTable() throws -> NoiseTable {
        guard let values = pipeline.manifest.noiseScheduler else {
            throw DiffusionError.input(
                "the manifest of these models has no noise_scheduler (the checkpoint's low_res_scheduler)")
        }
        return try NoiseTable(SchedulerConfiguration(values))
    }
}
