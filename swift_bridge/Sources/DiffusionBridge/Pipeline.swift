import Foundation

/// The models of one folder, and how to draw with them.
///
/// ```swift
/// let pipeline = try await Pipeline(contentsOf: folder)
/// for try await step in pipeline.generate(Request(prompt: "a red circle", seed: 1)) {
///     print("\(step.index + 1) of \(step.total)")
///     if step.isLast { picture = try await step.result().images[0] }
/// }
/// ```
/// Leaving the loop, or cancelling its task, ends the work within one step. Several pictures may be drawn at once.
public final class Pipeline: Sendable {
    /// How models are loaded and kept.
    public struct Configuration: Sendable {
        /// Where the models run; nil: where their manifest says.
        public var computeUnits: ComputeUnits?
        /// Load each model for its stage only, and free it then: less memory, more time for a picture.
        public var reduceMemory = false
        /// Bytes that the models may take at once: where all of them are larger, `reduceMemory` is on.
        public var memoryBudget: Int?
        /// Use the safety checker where there is one.
        public var checkSafety = true
        /// The folder of vocab.json and merges.txt; nil: the models' own.
        public var tokenizer: URL?
        /// For folders without a manifest: "epsilon", "v_prediction" or "sample"; nil: the family's usual one.
        public var predictionType: String?
        /// For folders without a manifest: the VAE's scaling factor; nil: the family's usual one.
        public var latentScale: Double?

        /// The configuration that suits most machines.
        public init() {}
    }

    /// What was chosen or assumed when the models were opened, for the user.
    public let notes: [String]
    let manifest: Manifest
    let models: Models
    let tokenizers: [Tokenizer]
    let checksSafety: Bool
    let folder: URL
    /// The component that denoises: "unet", or "refiner" of the pipeline that goes on for a base.
    let unet: String
    private let unetShapes: [String: [Int]]

    /// Open a folder that `coreml-sd convert` or Apple's tools wrote, or a variant in it. Models are loaded when they are
    /// needed first; in a folder without a manifest.json, UNet and decoder now.
    ///
    /// Throws a ``DiffusionError`` for a folder that holds no models or damaged ones.
    public init(contentsOf url: URL, configuration: Configuration = Configuration()) async throws {
        let found = try ModelFolder(url, configuration)
        folder = found.folder
        let size = found.components.values.reduce(0) { $0 + $1.sizeBytes }
        let isTooLarge = configuration.memoryBudget.map { size > $0 } ?? false
        let loads = found.components.mapValues { found.load($0, configuration.computeUnits) }
        models = Models(loads, keeps: !(configuration.reduceMemory || isTooLarge))
        var notes = found.notes
        if let read = found.manifest {
            manifest = read
        } else {
            let (made, note) = try await found.described(models, configuration)
            manifest = made
            notes.append(note)
        }
        checksSafety = configuration.checkSafety && models.has("safety_checker")
        if manifest.wantsSafetyChecker, configuration.checkSafety, !checksSafety {
            notes.append("the checkpoint asks for a safety checker, but there is none: pictures are not checked")
        }
        self.notes = notes
        tokenizers = try found.tokenizers(manifest)
        unet = "unet"
        unetShapes = try await Self.shapes(unet, manifest, models)
        await models.release(["unet", "vae_decoder"])
    }

    /// The refiner that lies beside a Stable Diffusion XL base, on the same models. Throws where there is none.
    init(refinerOf base: Pipeline) async throws {
        guard let manifest = base.manifest.ofRefiner() else {
            throw DiffusionError.input("refinerStart: these models have no refiner: convert SDXL with --refiner SOURCE")
        }
        (self.manifest, models, folder, notes) = (manifest, base.models, base.folder, [])
        checksSafety = base.checksSafety
        tokenizers = base.tokenizers.suffix(1)
        unet = "refiner"
        unetShapes = try await Self.shapes(unet, manifest, models)
        await models.release(unet)
    }

    /// Of the inputs of a UNet, as the manifest or the model itself says.
    private static func shapes(_ unet: String, _ manifest: Manifest, _ models: Models) async throws -> [String: [Int]] {
        var inputs = manifest.components[unet]?.inputs ?? []
        if inputs.isEmpty { inputs = Array(try await models.model(unet).inputs.values) }
        let shapes = Dictionary(inputs.map { ($0.name, $0.shape) }) { first, _ in first }
        for name in ["sample", "encoder_hidden_states"] where shapes[name]?.count != 4 {
            throw DiffusionError.package("\(manifest.name): \(unet): expected an input \(name) of four dimensions")
        }
        return shapes
    }

    /// The width of the pictures in pixels.
    public var width: Int { sample[3] * manifest.latents.factor }
    /// The height of the pictures in pixels.
    public var height: Int { sample[2] * manifest.latents.factor }
    /// How long each model took to load, in its first call and in the later ones.
    public var timings: [String: Timing] { get async { await models.timings } }

    var sample: [Int] { unetShapes["sample"] ?? [1, 4, 1, 1] }
    /// The text encoders that there are, in order.
    var encoders: [String] { TextStates.encoders.filter { manifest.components[$0] != nil } }
    var textLength: Int { unetShapes["encoder_hidden_states"]?.last ?? 0 }

    /// Draw pictures, step by step. Nothing is done before the first step is asked for.
    public func generate(_ request: Request) -> Generation {
        Generation(pipeline: self, request: request)
    }

    /// Load every model that a prompt alone needs and run it once, so that the first picture takes no longer than the
    /// next. Of no use with `reduceMemory`.
    public func prewarm() async throws {
        for name in encoders + [unet, "vae_decoder"] + (checksSafety ? ["safety_checker"] : []) {
            let model = try await models.model(name)
            _ = try await model.predict(model.inputs.mapValues { Tensor(repeating: 0, shape: $0.shape) })
        }
    }

    /// The request with the defaults of diffusers' pipeline for these models filled in.
    func settled(_ request: Request) -> Request {
        let family = Family.named(manifest.family)
        var settled = request
        var (scale, steps) = (family.guidanceScale, family.steps)
        // The defaults of diffusers' LatentConsistencyModelPipeline.
        if takesGuidance, !family.hasAddedConditions, request.mask == nil { (scale, steps) = (8.5, 4) }
        if request.mask != nil { scale = 7.5 }
        settled.numInferenceSteps = request.numInferenceSteps ?? steps
        settled.guidanceScale = request.guidanceScale ?? scale
        if request.image != nil, request.strength == nil {
            settled.strength = request.mask == nil ? family.strength : family.inPaintingStrength
        }
        return settled
    }

    /// Whether each picture needs two rows of the UNet's work. A UNet that takes the guidance scale as an input needs one.
    func isGuided(_ request: Request) -> Bool {
        Guidance.isGuided(settled(request).guidanceScale ?? 1) && !takesGuidance
    }

    private var takesGuidance: Bool { unetShapes["timestep_cond"] != nil }

    /// What the UNet takes beside states: SDXL's sizes and pooled text, the guidance scale.
    func told(_ request: Request, _ pooled: Tensor?, rows: Int) throws -> [String: Tensor] {
        var told: [String: Tensor] = [:]
        if unetShapes["text_embeds"] != nil {
            guard let pooled else {
                throw DiffusionError.input(
                    "unet: takes text_embeds, but the last text encoder gives no pooled_outputs")
            }
            told["text_embeds"] = pooled
        }
        if let count = unetShapes["time_ids"]?.last {
            let (ids, negative) = try request.sizes.timeIDs(size: [height, width], count: count)
            let pair = rows == request.count ? ids : negative + ids
            told["time_ids"] = Tensor(
                shape: [rows, count], values: Array((0..<request.count).map { _ in pair }.joined()))
        }
        if let width = unetShapes["timestep_cond"]?.last {
            let embedding = Guidance.embedding(request.guidanceScale ?? 1, width: width)
            told["timestep_cond"] = Tensor(
                shape: [rows, width], values: Array((0..<rows).map { _ in embedding }.joined()))
        }
        return told
    }

    /// The pictures of latents, flagged ones black; and the flags.
    func decoded(_ latents: Tensor) async throws -> (images: [Picture], flagged: [Bool]) {
        let decoder = try await models.model("vae_decoder")
        guard let input = decoder.inputs.keys.first, decoder.inputs.count == 1 else {
            throw DiffusionError.package("vae_decoder: expected one input")
        }
        let (scale, shift) = (manifest.latents.scale, manifest.latents.shift)
        var pictures: [Picture] = []
        for row in 0..<latents.shape[0] {
            try Task.checkCancellation()
            let scaled = latents.rows(row..<row + 1).mapped { $0 / scale + shift }
            pictures.append(Picture(decoded: try await decoder.one("image", [input: scaled])))
        }
        await models.release("vae_decoder")
        guard checksSafety else { return (pictures, pictures.map { _ in false }) }
        let checker = try await models.model("safety_checker")
        var flags: [Bool] = []
        for picture in pictures { flags.append(try await SafetyChecker.isFlagged(picture, by: checker)) }
        await models.release("safety_checker")
        let shown = zip(pictures, flags).map { $1 ? Picture.black($0.width, $0.height) : $0 }
        return (shown, flags)
    }
}
