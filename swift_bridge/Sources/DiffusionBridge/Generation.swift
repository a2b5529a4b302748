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
    /// The latents after this step, (pictures, channels, height, width).
    public let latents: Tensor
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
        return GenerationResult(images: images, flagged: flagged, latents: latents, notes: notes)
    }
}

/// What was drawn.
public struct GenerationResult: Sendable {
    /// One for each prompt; flagged ones are black.
    public let images: [Picture]
    /// Whether the safety checker flagged each; all false where nothing was checked.
    public let flagged: [Bool]
    /// What the pictures were decoded from, (pictures, channels, height, width): what a refiner goes on with.
    public let latents: Tensor
    /// What the user should know.
    public let notes: [String]
}

/// The state of one drawing.
actor Run {
    private let pipeline: Pipeline
    private let request: Request
    private var state: State?
    private var hasBegun = false
    private var isFinished = false
    private static let used = TextStates.encoders + ["vae_encoder", "depth_estimator", "unet"]

    private struct State {
        var job: Job
        let guidance: Guidance
        var latents: Tensor
        let calls: Range<Int>
        let blend: Blend?
        var index = 0
    }

    init(_ pipeline: Pipeline, _ request: Request) {
        self.pipeline = pipeline
        self.request = request
    }

    /// A loop that is left before its last step frees what it held, too.
    deinit {
        guard hasBegun, !isFinished else { return }
        let models = pipeline.models
        Task { await models.release(Self.used) }
    }

    func next() async throws -> Step? {
        guard !isFinished else { return nil }
        hasBegun = true
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
        await pipeline.models.release(Self.used)
    }

    private func begin() async throws -> State {
        var job = try Job(request, pipeline)
        let isGuided = pipeline.isGuided(job.request)
        let texts = TextStates(
            models: pipeline.models, tokenizers: pipeline.tokenizers,
            vocabularySizes: pipeline.manifest.components.compactMapValues(\.vocabularySize),
            zerosForMissing: pipeline.manifest.zerosForEmptyPrompt, length: pipeline.textLength,
            isStrict: request.longPrompt)
        let encoded = try await texts.encode(job.request.texts(isGuided: isGuided))
        job.notes += encoded.notes
        let prepared = try await job.prepared()
        let rows = encoded.states.shape[0]
        var told = try pipeline.told(job.request, encoded.pooled, rows: rows)
        told["encoder_hidden_states"] = encoded.states
        for (name, value) in prepared.labels { told[name] = Tensor(repeating: value, shape: [rows]) }
        let guidance = try Guidance(
            try await pipeline.models.model("unet"), pictures: request.count,
            Guidance.Conditions(rows: told, channels: prepared.channels),
            scale: isGuided ? job.request.guidanceScale ?? 1 : 1)
        return State(
            job: job, guidance: guidance, latents: prepared.latents, calls: prepared.calls, blend: prepared.blend)
    }

    private func advance(_ state: inout State) async throws -> Step {
        let place = state.calls.lowerBound + state.index
        let timestep = state.job.scheduler.timesteps[place]
        let input = state.job.scheduler.scaled(state.latents)
        let output = try await state.guidance.predict(input, timestep)
        var noise = state.job.noise
        state.latents = try state.job.scheduler.step(output, state.latents) { try noise.normal($0.shape) }
        state.job.noise = noise
        if let blend = state.blend {
            let next = state.calls.contains(place + 1) ? place + 1 : nil
            state.latents = blend.applied(to: state.latents, next: next, state.job.scheduler)
        }
        let (table, prediction) = (state.job.scheduler.table, state.job.scheduler.prediction)
        let step = Step(
            index: state.index, total: state.calls.count, timestep: timestep, notes: state.job.notes,
            latents: state.latents,
            estimate: { estimated(input, output, timestep, table: table, prediction: prediction) }, pipeline: pipeline)
        state.index += 1
        return step
    }
}
