/// The steps of one drawing, as a sequence to loop over. Each loop draws anew.
public struct Generation: AsyncSequence, Sendable {
    public typealias Element = Step
    let pipeline: Pipeline
    let request: Request

    /// Draws the next step when asked for it.
    public struct AsyncIterator: AsyncIteratorProtocol, Sendable {
        let run: Run

        /// The next step, nil after the last. Throws where something cannot be used, where a model fails, and where the
        /// task is cancelled.
        public func next() async throws -> Step? { try await run.next() }
    }

    public func makeAsyncIterator() -> AsyncIterator {
        AsyncIterator(run: Run(pipeline, request))
    }

    /// The pictures, without looking at the steps.
    public var result: GenerationResult {
        get async throws {
            var last: Step?
            for try await step in self { last = step }
            guard let last else { throw DiffusionError.input("no step was made") }
            return try await last.result()
        }
    }
}

/// One step of a drawing, done.
public struct Step: Sendable {
    /// Counted from 0.
    public let index: Int
    /// How many steps there are. Some schedulers make two calls of the UNet, and so two of these, for one of the request.
    public let total: Int
    /// The timestep that the UNet saw.
    public let timestep: Double
    /// What the user should know: a prompt that was cut, a picture that was resized.
    public let notes: [String]
    let latents: Tensor
    let estimate: @Sendable () -> Tensor
    let pipeline: Pipeline

    /// Whether the pictures are done.
    public var isLast: Bool { index + 1 == total }

    /// The pictures as they will be, judged from this step: one call of the decoder for each, and of the safety checker.
    public func preview() async throws -> [Picture] {
        try await pipeline.decoded(estimate()).images
    }

    /// The pictures of this step's latents; of the last step, the finished ones.
    public func result() async throws -> GenerationResult {
        let (images, flagged) = try await pipeline.decoded(latents)
        return GenerationResult(images: images, flagged: flagged, notes: notes)
    }
}

/// What was drawn.
public struct GenerationResult: Sendable {
    /// One for each prompt; flagged ones are black.
    public let images: [Picture]
    /// Whether the safety checker flagged each; all false where nothing was checked.
    public let flagged: [Bool]
    /// What the user should know.
    public let notes: [String]
}

/// The state of one drawing.
actor Run {
    private let pipeline: Pipeline
    private let request: Request
    private var state: State?
    private var isFinished = false

    private struct State {
        var scheduler: any Scheduler
        var noise: Noise
        var latents: Tensor
        let guidance: Guidance
        let first: Int
        let notes: [String]
        var index = 0
    }

    init(_ pipeline: Pipeline, _ request: Request) {
        self.pipeline = pipeline
        self.request = request
    }

    func next() async throws -> Step? {
        guard !isFinished else { return nil }
        do {
            try Task.checkCancellation()
            var state: State
            if let begun = self.state { state = begun } else { state = try await begin() }
            let step = try await advance(&state)
            self.state = state
            if step.isLast { await finish() }
            return step
        } catch {
            await finish()
            throw error
        }
    }

    private func finish() async {
        isFinished = true
        state = nil
        await pipeline.models.release("text_encoder", "unet")
    }

    private func begin() async throws -> State {
        try request.check()
        let manifest = pipeline.manifest
        guard pipeline.sample[1] == manifest.latents.channels else {
            throw DiffusionError.input(
                "the UNet takes \(pipeline.sample[1]) channels: in-painting, depth and upscaling models cannot be run "
                    + "by the Swift program yet")
        }
        let scheduler = try configuration().scheduler(steps: request.numInferenceSteps, eta: request.eta)
        var noise = Noise(seeds: request.seeds, source: request.randomSource)
        let texts = TextStates(
            models: pipeline.models, tokenizer: pipeline.tokenizer, manifest: manifest, length: pipeline.textLength,
            isLong: request.longPrompt)
        let (states, notes) = try await texts.encode(request.texts)
        await pipeline.models.release("text_encoder")
        let count = request.prompts.count
        let drawn = try noise.normal([count] + pipeline.sample.dropFirst())
        let guidance = try Guidance(
            try await pipeline.models.model("unet"), pictures: count,
            Guidance.Conditions(rows: ["encoder_hidden_states": states]), scale: request.guidanceScale)
        let latents = drawn.mapped { $0 * scheduler.initialNoise }
        return State(
            scheduler: scheduler, noise: noise, latents: latents, guidance: guidance, first: 0, notes: notes)
    }

    private func configuration() throws -> SchedulerConfiguration {
        let own = pipeline.manifest.schedulerConfiguration
        return request.scheduler?.applied(to: own) ?? own
    }

    private func advance(_ state: inout State) async throws -> Step {
        let place = state.first + state.index
        let timestep = state.scheduler.timesteps[place]
        let input = state.scheduler.scaled(state.latents)
        let output = try await state.guidance.predict(input, timestep)
        let before = state.scheduler
        var noise = state.noise
        state.latents = try state.scheduler.step(output, state.latents) { try noise.normal($0.shape) }
        state.noise = noise
        let (table, prediction) = (before.table, before.prediction)
        let step = Step(
            index: state.index, total: before.timesteps.count - state.first, timestep: timestep, notes: state.notes,
            latents: state.latents,
            estimate: { estimated(input, output, timestep, table: table, prediction: prediction) }, pipeline: pipeline)
        state.index += 1
        return step
    }
}
