/// What is asked for: one picture for each prompt. What is nil has the default of diffusers' pipeline for the models.
public struct Request: Sendable {
    /// What to draw, a text for each picture.
    public var prompts: [String]
    /// What not to draw: none, or one for each prompt.
    public var negativePrompts: [String]
    /// How many steps to make. Nil: 50, 75 for the x4 upscaler, 4 for latent consistency models.
    public var numInferenceSteps: Int?
    /// How closely to follow the prompt; 1 or less: off, and half the work. Nil: 7.5, 5 for Stable Diffusion XL, 8.5 for
    /// latent consistency models, 9 for the x4 upscaler.
    public var guidanceScale: Double?
    /// One for all pictures, or one each: then every picture depends on its own seed alone.
    public var seeds: [UInt64]
    /// Whose random numbers the seeds stand for.
    public var randomSource = RandomSource.torch
    /// The scheduler; nil is the checkpoint's own.
    public var scheduler: SchedulerKind?
    /// How much noise `ddim` adds at each step, 0 to 1.
    public var eta = 0.0
    /// A picture to start from, paint in or enlarge, resized where its size is not the models'.
    public var image: Picture?
    /// Greys as large as `image`: white marks what to paint anew.
    public var mask: Picture?
    /// The depth of `image`, for models of a depth checkpoint; nil: it is estimated.
    public var depth: DepthMap?
    /// How much of `image` may change, more than 0 to 1. Nil: 0.8, with a mask 1; Stable Diffusion XL's 0.3 and 0.9999.
    public var strength: Double?
    /// The noise that an upscaler puts on `image`, 0 to 350. Nil: 20.
    public var noiseLevel: Int?
    /// Start values (pictures, channels, height, width) in place of drawn ones; with `denoisingStart`, what another
    /// model left at its `denoisingEnd`.
    public var latents: Tensor?
    /// The part of the steps that another model has done, as Stable Diffusion XL's base for its refiner.
    public var denoisingStart: Double?
    /// The part of the steps after which another model goes on, from the result's latents.
    public var denoisingEnd: Double?
    /// The part of the steps after which the refiner goes on that lies beside a Stable Diffusion XL base, as 0.8; what
    /// `denoisingEnd` and `denoisingStart` do with two pipelines. Nil: no refiner.
    public var refinerStart: Double?
    /// What Stable Diffusion XL's UNets are told of the picture's size.
    public var sizes = SizeConditioning()
    /// Refuse a prompt that is too long for the models, rather than cut it.
    public var longPrompt = false

    /// A picture of a prompt. Without a seed one is drawn.
    public init(prompt: String, negativePrompt: String? = nil, seed: UInt64? = nil) {
        let drawn = seed ?? UInt64(UInt32.random(in: 0...UInt32.max))
        self.init(prompts: [prompt], negativePrompts: negativePrompt.map { [$0] } ?? [], seeds: [drawn])
    }

    /// A picture of each prompt, with one seed for all of them or one each.
    public init(prompts: [String], negativePrompts: [String] = [], seeds: [UInt64]) {
        self.prompts = prompts
        self.negativePrompts = negativePrompts
        self.seeds = seeds
    }

    /// Throw for what no models could do.
    public func check() throws {
        guard !prompts.isEmpty else {
            throw DiffusionError.input("no prompt: expected a text or several (an empty text is allowed)")
        }
        guard negativePrompts.isEmpty || negativePrompts.count == prompts.count else {
            throw DiffusionError.input(
                "\(negativePrompts.count) negative prompts for \(prompts.count) prompts: give one for each, or none")
        }
        guard seeds.count == 1 || seeds.count == prompts.count else {
            throw DiffusionError.input("\(seeds.count) seeds for \(prompts.count) pictures: give one, or one each")
        }
        if let seed = seeds.first(where: { randomSource == .numpy && $0 > UInt32.max }) {
            throw DiffusionError.input("seed \(seed) with rng numpy: expected a whole number, 0 to \(UInt32.max)")
        }
        try checkNumbers()
    }

    private func checkNumbers() throws {
        guard refinerStart == nil || denoisingEnd == nil else {
            throw DiffusionError.input("refinerStart and denoisingEnd are both given: give one")
        }
        if let steps = numInferenceSteps, steps < 1 {
            throw DiffusionError.input("\(steps) steps: expected a whole number, at least 1")
        }
        if let scale = guidanceScale, !(abs(scale) <= 1000) {
            throw DiffusionError.input("guidance scale \(scale): expected a number, usually 1 to 15")
        }
        guard (0...1).contains(eta) else { throw DiffusionError.input("eta \(eta): expected a number, 0 to 1") }
        if let strength, !(strength > 0 && strength <= 1) {
            throw DiffusionError.input(
                "strength \(strength): expected a number, more than 0 (no change) and at most 1 (a new picture)")
        }
        let parts = [("denoisingStart", denoisingStart), ("denoisingEnd", denoisingEnd), ("refinerStart", refinerStart)]
        for (name, part) in parts {
            if let part, !(part > 0 && part < 1) {
                throw DiffusionError.input("\(name) \(part): expected a part of the steps, more than 0 and less than 1")
            }
        }
    }

    var count: Int { prompts.count }
    /// The part of the steps after which this model's work ends, if not after the last.
    var end: Double? { refinerStart ?? denoisingEnd }
    /// What the refiner is asked for that goes on from `latents`; nil without one.
    func refined(_ latents: Tensor) -> Request? {
        guard let refinerStart else { return nil }
        var refined = self
        (refined.image, refined.mask, refined.strength, refined.refinerStart) = (nil, nil, nil, nil)
        (refined.latents, refined.denoisingStart) = (latents, refinerStart)
        return refined
    }

    /// One text per row of the UNet's work: guided, the negative prompt (nil: none is given) and the prompt of each
    /// picture.
    func texts(isGuided: Bool) -> [String?] {
        guard isGuided else { return prompts }
        let negatives: [String?] = negativePrompts.isEmpty ? prompts.map { _ in nil } : negativePrompts
        return zip(negatives, prompts).flatMap { [$0, $1] }
    }
}

/// What Stable Diffusion XL's UNets are told of a picture's size (Podell et al., SDXL, section 2.2). Sizes are height and
/// width in pixels, nil: the picture's own; a crop is top and left.
public struct SizeConditioning: Sendable {
    /// The size of what the picture is taken to be cut from.
    public var originalSize: [Int]?
    /// Where it is taken to be cut out.
    public var cropsCoordsTopLeft = [0, 0]
    /// The size that it is taken to have.
    public var targetSize: [Int]?
    /// The same for the negative prompt.
    public var negativeOriginalSize: [Int]?
    /// The same for the negative prompt, used with `negativeOriginalSize`.
    public var negativeCropsCoordsTopLeft = [0, 0]
    /// The same for the negative prompt.
    public var negativeTargetSize: [Int]?
    /// What the refiner is told, usually 0 to 10.
    public var aestheticScore = 6.0
    /// The same for the negative prompt.
    public var negativeAestheticScore = 2.5

    /// The picture's own size, uncut.
    public init() {}

    /// What is told for the prompt and for the negative prompt: 6 numbers to the base, 5 to the refiner.
    func timeIDs(size: [Int], count: Int) throws -> (prompt: [Float], negative: [Float]) {
        for pair in [originalSize, cropsCoordsTopLeft, targetSize, negativeOriginalSize, negativeCropsCoordsTopLeft,
            negativeTargetSize].compactMap({ $0 })
        where pair.count != 2 || !pair.allSatisfy({ (0...1 << 16).contains($0) }) {
            throw DiffusionError.input("size or crop \(pair): expected two whole numbers of pixels")
        }
        let ids = (originalSize ?? size) + cropsCoordsTopLeft
        let negative = negativeOriginalSize.map { $0 + negativeCropsCoordsTopLeft } ?? ids
        let target = targetSize ?? size
        switch count {
        case 6: return ((ids + target).map { Float($0) }, (negative + (negativeTargetSize ?? target)).map { Float($0) })
        case 5: return (ids.map { Float($0) } + [Float(aestheticScore)], negative.map { Float($0) } + [Float(negativeAestheticScore)])
        default: throw DiffusionError.input("unet: takes \(count) time_ids, expected 6 (SDXL) or 5 (refiner)")
        }
    }
}
