/// What is asked for: one picture for each prompt.
public struct Request: Sendable {
    /// What to draw, a text for each picture.
    public var prompts: [String]
    /// What not to draw: none, or one for each prompt.
    public var negativePrompts: [String]
    /// How many steps to make.
    public var numInferenceSteps = 50
    /// How closely to follow the prompt; 1 or less: off, and half the work.
    public var guidanceScale = 7.5
    /// One for all pictures, or one each: then every picture depends on its own seed alone.
    public var seeds: [UInt32]
    /// Whose random numbers the seeds stand for.
    public var randomSource = RandomSource.torch
    /// The scheduler; nil is the checkpoint's own.
    public var scheduler: SchedulerKind?
    /// How much noise `ddim` adds at each step, 0 to 1.
    public var eta = 0.0
    /// Encode a prompt that is too long in pieces, where the UNet has room; else it is cut.
    public var longPrompt = false

    /// A picture of a prompt. Without a seed one is drawn.
    public init(prompt: String, negativePrompt: String = "", seed: UInt32? = nil) {
        self.init(prompts: [prompt], negativePrompts: [negativePrompt], seeds: [seed ?? .random(in: 0...UInt32.max)])
    }

    /// A picture of each prompt, with one seed for all of them or one each.
    public init(prompts: [String], negativePrompts: [String] = [], seeds: [UInt32]) {
        self.prompts = prompts
        self.negativePrompts = negativePrompts
        self.seeds = seeds
    }

    /// Throw for what no models could do.
    func check() throws {
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
        guard numInferenceSteps > 0 else {
            throw DiffusionError.input("\(numInferenceSteps) steps: expected a whole number, at least 1")
        }
        guard guidanceScale.isFinite, abs(guidanceScale) <= 1000 else {
            throw DiffusionError.input("guidance scale \(guidanceScale): expected a number, usually 1 to 15")
        }
        guard (0...1).contains(eta) else { throw DiffusionError.input("eta \(eta): expected a number, 0 to 1") }
    }

    /// One text per row of the UNet's work: guided, the negative prompt and the prompt of each picture.
    var texts: [String] {
        guard Guidance.isGuided(guidanceScale) else { return prompts }
        let negatives = negativePrompts.isEmpty ? prompts.map { _ in "" } : negativePrompts
        return zip(negatives, prompts).flatMap { [$0, $1] }
    }
}
