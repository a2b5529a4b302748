#if canImport(SwiftUI) && canImport(CoreGraphics)
    import DiffusionBridge
    import SwiftUI

    /// A prompt, a button that draws and stops, and the picture: all that an app needs.
    public struct DrawingView: View {
        private let models: URL
        @State private var pipeline: Pipeline?
        @State private var prompt = "a red circle on a white background"
        @State private var picture: CGImage?
        @State private var status = ""
        @State private var work: Task<Void, Never>?

        /// For the folder of a variant's models, as `compiled` in its zip.
        public init(models: URL) {
            self.models = models
        }

        public var body: some View {
            VStack {
                if let picture { Image(decorative: picture, scale: 1).resizable().scaledToFit() }
                TextField("Prompt", text: $prompt)
                Button(work == nil ? "Draw" : "Stop") {
                    if let work { work.cancel() } else { start() }
                }
                Text(status)
            }
            .padding()
            .onDisappear { work?.cancel() }
        }

        private func start() {
            work = Task {
                do {
                    try await draw()
                    status = ""
                } catch is CancellationError {
                    status = "stopped"
                } catch {
                    status = "\(error)"
                }
                work = nil
            }
        }

        private func draw() async throws {
            status = "loading models"
            var configuration = Pipeline.Configuration()
            configuration.memoryBudget = 2_000_000_000
            let opened: Pipeline
            if let pipeline {
                opened = pipeline
            } else {
                opened = try await Pipeline(contentsOf: models, configuration: configuration)
                pipeline = opened
            }
            for try await step in opened.generate(Request(prompt: prompt)) {
                status = "step \(step.index + 1) of \(step.total)"
                if step.isLast { picture = try await step.result().images[0].cgImage }
            }
        }
    }
#endif
