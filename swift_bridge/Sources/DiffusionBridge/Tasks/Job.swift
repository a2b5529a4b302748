import Foundation

/// A request with its defaults filled in, and what belongs to this drawing alone.
struct Job {
    let request: Request
    let purpose: Purpose
    let pipeline: Pipeline
    var scheduler: any Scheduler
    var noise: Noise
    /// What the user should know.
    var notes: [String] = []

    init(_ request: Request, _ pipeline: Pipeline) throws {
        try request.check()
        purpose = try Purpose(channels: pipeline.sample[1], request)
        self.request = pipeline.settled(request)
        let steps = self.request.numInferenceSteps ?? 50
        self.pipeline = pipeline
        let own = pipeline.manifest.schedulerConfiguration.imposing(purpose.schedulerSettings)
        scheduler = try (request.scheduler?.applied(to: own) ?? own).scheduler(
            steps: steps, eta: request.eta)
        noise = Noise(seeds: request.seeds, source: request.randomSource)
        try check()
    }

    /// (pictures, channels, height, width)
    var latentShape: [Int] { [request.count, pipeline.manifest.latents.channels] + pipeline.sample.dropFirst(2) }
    /// Height and width of latents.
    var latentSize: (height: Int, width: Int) { (pipeline.sample[2], pipeline.sample[3]) }
    var strength: Double { request.strength ?? 0.8 }
    private var steps: Int { request.numInferenceSteps ?? 50 }

    /// How many pictures are drawn for: one for all where they share their noise.
    private var drawn: Int { noise.isPerPicture ? request.count : 1 }

    /// Where drawing starts. Draws random numbers in diffusers' order.
    mutating func prepared() async throws -> Prepared {
        switch purpose {
        case .textToImage: return try textToImage()
        case .imageToImage: return try await imageToImage()
        case .blending: return try await blending()
        case .inPainting: return try await inPainting()
        case .depthToImage:
            let depth = try await depthChannel()
            var prepared = try await imageToImage()
            prepared.channels = depth
            return prepared
        case .upscaling: return try upscaling()
        }
    }

    /// Throw for what can be seen without any model.
    private mutating func check() throws {
        if let latents = request.latents, latents.shape != latentShape {
            throw DiffusionError.input("latents have shape \(latents.shape), expected \(latentShape)")
        }
        switch purpose {
        case .textToImage:
            guard request.denoisingStart == nil || request.latents != nil else {
                throw DiffusionError.input("denoisingStart needs the latents of the model that began: give them")
            }
            _ = try calls()
        case .imageToImage, .depthToImage:
            _ = try image()
            _ = try calls()
            if purpose == .depthToImage, request.depth == nil, !pipeline.models.has("depth_estimator") {
                throw DiffusionError.input(
                    "these models have no depth_estimator: give the depth, or convert again with it")
            }
        case .blending, .inPainting:
            _ = try imageAndMask()
            _ = try calls()
        case .upscaling: try checkUpscaling()
        }
    }

    /// The scheduler's calls that are made: all, those that the strength leaves, or this model's part.
    mutating func calls() throws -> Range<Int> {
        let all = scheduler.timesteps
        let total = Double(scheduler.table.count)
        var first = 0
        if let start = request.denoisingStart {
            var count = all.count { $0 < (total - start * total).rounded(.toNearestOrEven) }
            // Never between the two halves of a step.
            if scheduler.order == 2, count % 2 == 0 { count += 1 }
            first = all.count - count
        } else if request.image != nil, purpose != .upscaling {
            first = try scheduler.firstCall(steps: steps, strength: strength)
        }
        var last = all.count
        if let end = request.end {
            last = first + all[first...].count { $0 >= (total - end * total).rounded(.toNearestOrEven) }
        }
        guard first < last else {
            throw DiffusionError.input(
                "no step lies between denoisingStart \(request.denoisingStart ?? 0) and "
                    + "\(request.refinerStart == nil ? "denoisingEnd" : "refinerStart") \(request.end ?? 1): use more steps")
        }
        scheduler.position = first
        return first..<last
    }

    /// The picture that was given in the size that is needed, noted where it had another.
    mutating func image() throws -> Picture {
        guard let image = request.image else { throw DiffusionError.input("this task needs an image") }
        let size = purpose == .upscaling ? latentSize : (pipeline.height, pipeline.width)
        return resized(image, "image", size)
    }

    mutating func resized(_ picture: Picture, _ what: String, _ size: (height: Int, width: Int)) -> Picture {
        guard picture.width != size.width || picture.height != size.height else { return picture }
        let note =
            "the \(what) was resized from \(picture.width)x\(picture.height) to \(size.width)x\(size.height), which "
            + "these models take"
        if !notes.contains(note) { notes.append(note) }
        return picture.resized(size.width, size.height, .lanczos)
    }

    /// Latents of a picture (1, 3, height, width) in -1..1, drawn from the encoder's distribution: one for all pictures,
    /// or one each where each has its own noise.
    mutating func encode(_ image: Tensor) async throws -> Tensor {
        let encoder = try await pipeline.models.model("vae_encoder")
        guard let input = encoder.inputs.keys.first, encoder.inputs.count == 1 else {
            throw DiffusionError.package("vae_encoder: expected one input")
        }
        let moments = try await encoder.one("latent", [input: image])
        guard moments.shape.count == 4, moments.shape[0] == 1, moments.shape[1] % 2 == 0 else {
            throw DiffusionError.package("vae_encoder: gave shape \(moments.shape), expected mean and log-variance")
        }
        let shape = [moments.shape[1] / 2] + moments.shape.dropFirst(2)
        var sample = try noise.normal([drawn] + shape)
        let size = sample.rowCount
        let latents = pipeline.manifest.latents
        for index in sample.values.indices {
            let (mean, variance) = (moments.values[index % size], moments.values[size + index % size])
            let deviation = exp(0.5 * min(max(variance, -30), 20))
            sample.values[index] = (mean + deviation * sample.values[index] - latents.shift) * latents.scale
        }
        return sample
    }
}

/// Where a drawing starts, and what the UNet is given beside latents, timestep and text.
struct Prepared {
    /// At the noise level of the first call.
    var latents: Tensor
    /// Which of the scheduler's calls are made.
    let calls: Range<Int>
    /// Concatenated to the latents in every call of the UNet: (pictures or 1, channels, height, width).
    var channels: Tensor?
    /// Inputs with one value for every row.
    var labels: [String: Float] = [:]
    var blend: Blend?
}

/// What stays of a picture that is painted in by a UNet that does not see the mask.
struct Blend {
    let clean: Tensor
    let noise: Tensor
    /// 1 where it is painted anew: (1, 1, height, width).
    let mask: Tensor

    /// After each step, the part that stays is replaced by the picture at the noise level of call `next`; after the last
    /// one by the picture itself.
    func applied(to latents: Tensor, next: Int?, _ scheduler: any Scheduler) -> Tensor {
        let kept = next.map { scheduler.noised(clean, noise, at: $0) } ?? clean
        var values = latents.values
        let size = mask.values.count
        for index in values.indices {
            let share = mask.values[index % size]
            values[index] = (1 - share) * kept.values[index] + share * values[index]
        }
        return Tensor(shape: latents.shape, values: values)
    }
}

extension Picture {
    /// (1, 3, height, width) in -1..1.
    var tensor: Tensor {
        let size = width * height
        var values = [Float](repeating: 0, count: 3 * size)
        for channel in 0..<3 {
            for index in 0..<size { values[channel * size + index] = Float(bytes[3 * index + channel]) / 255 * 2 - 1 }
        }
        return Tensor(shape: [1, 3, height, width], values: values)
    }
}
