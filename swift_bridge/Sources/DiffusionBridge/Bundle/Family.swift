/// What sets a model family apart, as the Python package's table of families has it. The defaults are Stable
/// Diffusion 1's.
struct Family: Sendable {
    let name: String
    /// Channels that the UNet takes: what pictures it is given follows from them.
    var channels = 4
    /// The width of the states that the UNet attends to.
    var textWidth = 768
    var predictionType = "epsilon"
    var latentFactor = 8
    var latentScale = 0.18215
    /// Of its pictures, in pixels.
    var size = 512
    var asksForSafetyChecker = false
    /// How the picture that an upscaler is given is noised.
    var noiseScheduler: [String: JSON]?
    /// What diffusers' pipeline class imposes on whatever scheduler it is made with.
    var schedulerSettings = Family.plainSettings
    /// The UNet is told sizes and takes the whole text's state, as SDXL's.
    var hasAddedConditions = false
    var steps = 50
    var guidanceScale = 7.5
    var strength = 0.8
    var inPaintingStrength = 1.0

    /// What prompts are padded with where no tokenizer_config.json says so.
    var padding: String? { [1024, 1280].contains(textWidth) ? "!" : nil }

    private static let plainSettings: [String: JSON] = ["steps_offset": .integer(1), "clip_sample": .bool(false)]
    private static let inPaintingSettings: [String: JSON] = [
        "steps_offset": .integer(1), "skip_prk_steps": .bool(true),
    ]
    private static let lowResolutionScheduler: [String: JSON] = [
        "_class_name": .string("DDPMScheduler"), "beta_end": .number(0.02), "beta_schedule": .string("scaled_linear"),
        "beta_start": .number(0.0001), "num_train_timesteps": .integer(1000),
    ]

    static let all: [Family] = [
        Family(name: "sd1", asksForSafetyChecker: true),
        Family(
            name: "sd1-inpainting", channels: 9, asksForSafetyChecker: true, schedulerSettings: inPaintingSettings),
        Family(name: "sd1-pix2pix", channels: 8, asksForSafetyChecker: true, schedulerSettings: [:]),
        Family(name: "sd2-base", textWidth: 1024),
        Family(name: "sd2-v", textWidth: 1024, predictionType: "v_prediction", size: 768),
        Family(name: "sd2-inpainting", channels: 9, textWidth: 1024, schedulerSettings: inPaintingSettings),
        Family(name: "sd2-depth", channels: 5, textWidth: 1024, schedulerSettings: [:]),
        Family(
            name: "x4-upscaler", channels: 7, textWidth: 1024, predictionType: "v_prediction", latentFactor: 4,
            latentScale: 0.08333, noiseScheduler: lowResolutionScheduler, schedulerSettings: [:], steps: 75,
            guidanceScale: 9),
        xl("sdxl", channels: 4, textWidth: 2048),
        xl("sdxl-inpainting", channels: 9, textWidth: 2048),
        xl("sdxl-pix2pix", channels: 8, textWidth: 2048),
        xl("sdxl-refiner", channels: 4, textWidth: 1280),
    ]

    private static func xl(_ name: String, channels: Int, textWidth: Int) -> Family {
        Family(
            name: name, channels: channels, textWidth: textWidth, latentScale: 0.13025, size: 1024,
            schedulerSettings: [:], hasAddedConditions: true, guidanceScale: 5, strength: 0.3,
            inPaintingStrength: 0.9999)
    }

    /// The family of a name; Stable Diffusion 1 for one that is not known.
    static func named(_ name: String) -> Family { all.first { $0.name == name } ?? all[0] }

    /// The family of a UNet of which only the interface is known. Among families with the same interface, the one whose
    /// usual pictures are the largest that fit is meant.
    static func fitting(channels: Int, textWidth: Int, latentSize: Int, hasAddedConditions: Bool) -> Family {
        let alike = all.filter { $0.channels == channels && $0.hasAddedConditions == hasAddedConditions }
        let same = alike.filter { $0.textWidth == textWidth }
        let bySize = (same.isEmpty ? alike : same).sorted { $0.size < $1.size }
        return bySize.last { $0.size <= latentSize * $0.latentFactor } ?? bySize.first ?? all[0]
    }
}
