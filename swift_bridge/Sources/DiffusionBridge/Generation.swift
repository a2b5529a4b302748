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
    /// The refiner's part, until it is begun.
    private var rest: Stage?
    private var index = 0
    private var total = 0
    private var hasBegun = false
    private var isFinished = false
    private static let used = TextStates.encoders + ["vae_encoder", "depth_estimator", "unet", "refiner"]

    /// One pipeline's part of a drawing, prepared: all but its UNet.
    private struct Stage {
        let pipeline: Pipeline
        var job: Job
        let conditions: Guidance.Conditions
        /// Of the guidance, 1 where there is none.
        let scale: Double
        var latents: Tensor
        let calls: Range<Int>
        let blend: Blend?
    }

    private struct State {
        var stage: Stage
        let guidance: Guidance
        var place: Int
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
            if step.isLast { await finish() } else if state.place == state.stage.calls.upperBound { await leave(state) }
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

    /// The base's part is over: its UNet is freed, and the refiner goes on with its latents and random numbers.
    private func leave(_ base: State) async {
        rest?.latents = base.stage.latents
        rest?.job.noise = base.stage.job.noise
        state = nil
        await pipeline.models.release(base.stage.pipeline.unet)
    }

    /// The next part's first state. Everything is checked and prepared before the first step.
    private func begin() async throws -> State {
        guard let rest else {
            let job = try Job(request, pipeline)
            var refined: Job?
            if let goesOn = request.refined(Tensor(repeating: 0, shape: job.latentShape)) {
                refined = try Job(goesOn, try await Pipeline(refinerOf: pipeline))
            }
            let stage = try await prepare(job)
            if let refined { rest = try await prepare(refined) }
            total = stage.calls.count + (rest?.calls.count ?? 0)
            return try await begin(stage)
        }
        self.rest = nil
        return try await begin(rest)
    }

    private func begin(_ stage: Stage) async throws -> State {
        let unet = try await stage.pipeline.models.model(stage.pipeline.unet)
        let guidance = try Guidance(
            unet, pictures: stage.job.request.count, stage.conditions, scale: stage.scale)
        return State(stage: stage, guidance: guidance, place: stage.calls.lowerBound)
    }

    private func prepare(_ unprepared: sending Job) async throws -> Stage {
        var job = unprepared
        let pipeline = job.pipeline
        let isGuided = pipeline.isGuided(job.request)
        let texts = TextStates(
            models: pipeline.models, names: pipeline.encoders, tokenizers: pipeline.tokenizers,
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
        return Stage(
            pipeline: pipeline, job: job, conditions: Guidance.Conditions(rows: told, channels: prepared.channels),
            scale: isGuided ? job.request.guidanceScale ?? 1 : 1, latents: prepared.latents, calls: prepared.calls,
            blend: prepared.blend)
    }

    private func advance(_ state: inout State) async throws -> Step {
        let place = state.place
        let timestep = state.stage.job.scheduler.timesteps[place]
        let input = state.stage.job.scheduler.scaled(state.stage.latents)
        let output = try await state.guidance.predict(input, timestep)
        var noise = state.stage.job.noise
        state.stage.latents = try state.stage.job.scheduler.step(output, state.stage.latents) { try noise.normal($0.shape) }
        state.stage.job.noise = noise
        if let blend = state.stage.blend {
            let next = state.stage.calls.contains(place + 1) ? place + 1 : nil
            state.stage.latents = blend.applied(to: state.stage.latents, next: next, state.stage.job.scheduler)
        }
        let (table, prediction) = (state.stage.job.scheduler.table, state.stage.job.scheduler.prediction)
        let step = Step(
            index: index, total: total, timestep: timestep, notes: state.stage.job.notes, latents: state.stage.latents,
            estimate: { estimated(input, output, timestep, table: table, prediction: prediction) }, pipeline: pipeline)
        state.place += 1
        index += 1
        return step
    }
}
