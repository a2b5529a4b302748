import Foundation
import Testing

@testable import DiffusionBridge

#if !canImport(Darwin)
    import CoreML
#endif

/// Packages that `tests/swift` makes and names in the environment: they compute next to nothing.
private let folder = ProcessInfo.processInfo.environment["BRIDGE_MODELS"].map { URL(fileURLWithPath: $0) }

/// The same with two text encoders and a refiner.
private let withRefiner = ProcessInfo.processInfo.environment["BRIDGE_REFINER"].map { URL(fileURLWithPath: $0) }

private func opened(_ change: (inout Pipeline.Configuration) -> Void = { _ in }) async throws -> Pipeline {
    var configuration = Pipeline.Configuration()
    change(&configuration)
    return try await Pipeline(contentsOf: try #require(folder), configuration: configuration)
}

private func request(_ prompt: String = "a red circle", seed: UInt64 = 1, steps: Int = 4) -> Request {
    var request = Request(prompt: prompt, seed: seed)
    request.numInferenceSteps = steps
    request.scheduler = .ddim
    return request
}

@Suite(.enabled(if: folder != nil, "no BRIDGE_MODELS: run `make swift`"), .serialized)
struct PipelineTests {
    @Test func stepsAreCountedAndTheLastOneHasThePicture() async throws {
        let pipeline = try await opened()
        var indices: [Int] = []
        var last: GenerationResult?
        for try await step in pipeline.generate(request()) {
            indices.append(step.index)
            #expect(try await step.preview().count == 1 && step.total == 4)
            if step.isLast { last = try await step.result() }
        }
        let result = try #require(last)
        #expect(indices == [0, 1, 2, 3] && result.flagged == [false])
        #expect(result.images[0].width == 64 && result.images[0].height == 64)
        #expect(try await pipeline.generate(request()).result.images == result.images)
        #expect(try await pipeline.generate(request(seed: 2)).result.images != result.images)
    }

    @Test func reducedMemoryFreesModelsAndDrawsTheSame() async throws {
        let kept = try await opened()
        let lean = try await opened { $0.reduceMemory = true }
        let budgeted = try await opened { $0.memoryBudget = 1 << 40 }
        let expected = try await kept.generate(request()).result.images
        for pipeline in [lean, budgeted] {
            #expect(try await pipeline.generate(request()).result.images == expected)
            _ = try await pipeline.generate(request()).result
        }
        #expect(await lean.models.isLoaded("unet") == false)
        #expect(await budgeted.models.isLoaded("unet"))
        let timing = try #require(await kept.timings["unet"])
        #expect(timing.calls == 4 && timing.loadSeconds > 0 && timing.firstCallSeconds > 0 && timing.steadySeconds > 0)
    }

    @Test func severalPicturesAtOnceAreThoseDrawnAlone() async throws {
        let pipeline = try await opened()
        var both = request()
        (both.prompts, both.negativePrompts, both.seeds) = (["a cat", "on the white"], [], [3, 4])
        for scale in [7.5, 1.0] {
            both.guidanceScale = scale
            let together = try await pipeline.generate(both).result.images
            for (index, prompt) in both.prompts.enumerated() {
                var one = request(prompt, seed: both.seeds[index])
                one.guidanceScale = scale
                #expect(try await pipeline.generate(one).result.images[0] == together[index])
            }
        }
    }

    @Test func guidanceOfOneTakesHalfTheCalls() async throws {
        let pipeline = try await opened()
        var pair = request()
        (pair.prompts, pair.negativePrompts, pair.guidanceScale) = (["a", "b"], [], 1)
        _ = try await pipeline.generate(pair).result
        #expect(await pipeline.timings["unet"]?.calls == 4)
    }

    @Test func cancellingEndsWithinOneStep() async throws {
        let pipeline = try await opened()
        let task = Task {
            var steps = 0
            for try await _ in pipeline.generate(request(steps: 500)) {
                steps += 1
                withUnsafeCurrentTask { $0?.cancel() }
            }
            return steps
        }
        await #expect(throws: CancellationError.self) { try await task.value }
        #expect(await pipeline.timings["unet"]?.calls == 1)
    }

    @Test func fourPipelinesDrawAtOnce() async throws {
        let expected = try await opened().generate(request()).result.images
        let drawn = try await withThrowingTaskGroup(of: [Picture].self) { group in
            for _ in 0..<4 { group.addTask { try await opened().generate(request()).result.images } }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        #expect(drawn.count == 4 && drawn.allSatisfy { $0 == expected })
    }

    #if !canImport(Darwin)
        @Test func rowsWithGapsMakeTheSamePicture() async throws {
            let expected = try await opened().generate(request()).result.images
            StandIn.rowAlignment = 64
            defer { StandIn.rowAlignment = 1 }
            #expect(try await opened().generate(request()).result.images == expected)
        }

        @Test func aChildThatDiesInTheMiddleIsAnErrorAndNoHang() async throws {
            let pipeline = try await opened()
            let error = await #expect(throws: DiffusionError.self) {
                for try await step in pipeline.generate(request()) where step.index == 1 {
                    kill(try #require(StandIn.childProcess), SIGKILL)
                }
            }
            #expect(error?.kind == .model && error?.message.contains("ended with code 9") == true)
        }

        @Test func fiftyPicturesInARowDoNotGrow() async throws {
            let pipeline = try await opened()
            for _ in 0..<10 { _ = try await pipeline.generate(request(steps: 2)).result }
            let before = try residentBytes()
            for _ in 0..<50 { _ = try await pipeline.generate(request(steps: 2)).result }
            let grown = try residentBytes() - before
            #expect(grown < 4 << 20, "\(grown) bytes more")
        }

        private func residentBytes() throws -> Int {
            let fields = try String(contentsOfFile: "/proc/self/statm", encoding: .utf8).split(separator: " ")
            return try #require(Int(fields[1])) * Int(getpagesize())
        }
    #endif

    @Test func modelsAreLoadedOnceForSeveralPictures() async throws {
        let pipeline = try await opened()
        try await pipeline.prewarm()
        let loaded = await pipeline.timings.mapValues(\.loadSeconds)
        for seed in 1...2 as ClosedRange<UInt64> { _ = try await pipeline.generate(request(seed: seed)).result }
        #expect(await pipeline.timings.mapValues(\.loadSeconds) == loaded)
        #expect(await pipeline.timings["unet"]?.calls == 1 + 2 * 4)
    }

    @Test func previewsAreOfTheCleanEstimateAndResultsOfTheLatents() async throws {
        let pipeline = try await opened()
        for try await step in pipeline.generate(request()) where step.index == 1 {
            let decoded = try await pipeline.decoded(step.latents).images
            #expect(try await step.result().images == decoded)
            #expect(try await step.preview() != decoded)
        }
    }

    @Test func aPictureIsResizedNotedAndChangedAsFarAsTheStrengthSays() async throws {
        let pipeline = try await opened()
        var changed = request()
        changed.image = try Picture(width: 32, height: 16, bytes: [UInt8](repeating: 200, count: 3 * 32 * 16))
        var pictures: [[Picture]] = []
        for (strength, steps) in [(0.5, 2), (1.0, 4)] {
            changed.strength = strength
            var count = 0
            for try await step in pipeline.generate(changed) {
                count += 1
                #expect(step.notes == ["the image was resized from 32x16 to 64x64, which these models take"])
                if step.isLast { pictures.append(try await step.result().images) }
            }
            #expect(count == steps)
        }
        #expect(pictures[0] != pictures[1])
        // Even the strongest change sees the picture.
        changed.image = .black(64, 64)
        #expect(try await pipeline.generate(changed).result.images != pictures[1])
    }

    @Test(arguments: [SchedulerKind.pndm, .dpmPlusPlus2M, .unipc, .lms, .heun])
    func nothingIsKeptThatTheNextStepDoesNotNeed(scheduler: SchedulerKind) async throws {
        var asked = request(steps: 40)
        asked.scheduler = scheduler
        let run = Run(try await opened(), asked)
        var kept: [Int] = []
        while try await run.next() != nil { kept.append(tensors(in: run)) }
        // Solvers of higher order keep the last few predictions.
        #expect(kept[8] > 0 && kept[30] == kept[8])
    }

    /// How many tensors something holds on to.
    private func tensors(in value: Any, depth: Int = 0) -> Int {
        if value is Tensor { return 1 }
        guard depth < 12, !(value is [Float]), !(value is [Double]), !(value is Pipeline) else { return 0 }
        return Mirror(reflecting: value).children.reduce(0) { $0 + tensors(in: $1.value, depth: depth + 1) }
    }

    @Test func aLoopThatIsLeftFreesWhatItHeld() async throws {
        let pipeline = try await opened { $0.reduceMemory = true }
        for try await step in pipeline.generate(request()) where step.index == 1 { break }
        for _ in 0..<500 where await pipeline.models.isLoaded("unet") { try await Task.sleep(for: .milliseconds(10)) }
        #expect(await pipeline.models.isLoaded("unet") == false)
    }

    @Test func latentsGoOnWhereAnotherModelEnded() async throws {
        let pipeline = try await opened()
        let whole = try await pipeline.generate(request()).result
        var first = request()
        first.denoisingEnd = 0.5
        let half = try await pipeline.generate(first).result
        var second = request()
        (second.denoisingStart, second.latents) = (0.5, half.latents)
        #expect(try await pipeline.generate(second).result.images == whole.images)
        second.latents = Tensor(repeating: 0, shape: [1, 4, 1, 1])
        await #expect(throws: DiffusionError.self) { try await pipeline.generate(second).result }
        second.latents = nil
        await #expect(throws: DiffusionError.self) { try await pipeline.generate(second).result }
    }

    @Test func aRefinerGoesOnWhereItsBaseEndsAndItsUNetAloneIsLoadedThen() async throws {
        var configuration = Pipeline.Configuration()
        configuration.reduceMemory = true
        let pipeline = try await Pipeline(contentsOf: try #require(withRefiner), configuration: configuration)
        var asked = request()
        (asked.scheduler, asked.refinerStart) = (.eulerAncestral, 0.5)
        var last: GenerationResult?
        var seen: [Int] = []
        for try await step in pipeline.generate(asked) {
            seen.append(step.index)
            #expect(step.total == 4)
            #expect(await pipeline.models.isLoaded("unet") == (step.index == 0))
            #expect(await pipeline.models.isLoaded("refiner") == (step.index == 2))
            if step.isLast { last = try await step.result() }
        }
        #expect(seen == [0, 1, 2, 3])
        asked.scheduler = .ddim
        var base = asked
        (base.refinerStart, base.denoisingEnd) = (nil, 0.5)
        let half = try await pipeline.generate(base).result
        let refined = try #require(asked.refined(half.latents))
        let apart = try await Pipeline(refinerOf: pipeline).generate(refined).result
        let together = try await pipeline.generate(asked).result
        #expect(together.images == apart.images && together.images != half.images && together.images != last?.images)
    }

    @Test func aRefinerThatIsNotThereOrHasNothingToDoIsSaid() async throws {
        var asked = request()
        asked.refinerStart = 0.8
        let none = await #expect(throws: DiffusionError.self) { try await opened().generate(asked).result }
        #expect(none?.message.contains("have no refiner: convert SDXL with --refiner") == true)
        let pipeline = try await Pipeline(contentsOf: try #require(withRefiner))
        let wrong: [(String, (inout Request) -> Void)] = [
            ("more than 0 and less than 1", { $0.refinerStart = 1 }), ("both given", { $0.denoisingEnd = 0.5 }),
            ("use more steps", { ($0.refinerStart, $0.numInferenceSteps) = (0.999, 2) }),
            ("a refinerStart, but these models do", { ($0.image, $0.mask) = (.black(64, 64), .black(64, 64)) }),
        ]
        for (words, change) in wrong {
            var request = asked
            change(&request)
            let error = await #expect(throws: DiffusionError.self) { try await pipeline.generate(request).result }
            #expect(error?.message.contains(words) == true)
        }
        #expect(await pipeline.timings["unet"]?.calls == 0)
    }

    @Test func whatCannotBeDoneIsSaid() async throws {
        let pipeline = try await opened()
        var wrong = request()
        wrong.seeds = [1, 2]
        await #expect(throws: DiffusionError.self) { try await pipeline.generate(wrong).result }
        await #expect(throws: DiffusionError.self) { try await pipeline.generate(request(steps: 2000)).result }
        await #expect(throws: DiffusionError.self) { try await pipeline.generate(request("(a:99)")).result }
        let nowhere = URL(fileURLWithPath: "/nowhere")
        let error = await #expect(throws: DiffusionError.self) { try await Pipeline(contentsOf: nowhere) }
        #expect(error?.message.contains("/nowhere") == true)
    }
}
