/// Prompts to the states that the UNet attends to.
struct TextStates {
    private static let outputs = ["last_hidden_state", "hidden_embeds"]
    let models: Models
    let tokenizer: Tokenizer
    let manifest: Manifest
    /// How many text tokens the UNet takes.
    let length: Int
    /// Encode a prompt that is too long in as many pieces as the UNet takes, rather than cut it.
    let isLong: Bool

    /// States (texts, width, 1, length) as the UNet takes them, and notes on what was cut. Each distinct text is
    /// encoded once.
    func encode(_ texts: [String]) async throws -> (Tensor, [String]) {
        let pieces = try self.pieces()
        var states: [String: Tensor] = [:]
        var notes: [String] = []
        for text in texts where states[text] == nil {
            let tokens = try tokenizer.encode(text, pieces: isLong ? pieces : 1)
            if !tokens.lost.isEmpty { notes.append(try note(tokens, pieces)) }
            states[text] = try await encode(text, try padded(tokens, pieces))
        }
        return (Tensor.concatenated(texts.compactMap { states[$0] }), notes)
    }

    private func pieces() throws -> Int {
        guard length >= tokenizer.length, length % tokenizer.length == 0 else {
            throw DiffusionError.input(
                "unet: takes \(length) text tokens, no multiple of the encoder's \(tokenizer.length)")
        }
        return length / tokenizer.length
    }

    private func note(_ tokens: Tokens, _ pieces: Int) throws -> String {
        let room = (tokenizer.length - 2) * tokens.ids.count
        let lost = tokens.lost.count <= 300 ? tokens.lost : tokens.lost.prefix(300) + "…"
        if isLong {
            throw DiffusionError.input(
                "the prompt is longer than the \(room) tokens that this UNet has room for, even in pieces (it takes "
                    + "\(pieces * tokenizer.length) with starts and ends): shorten it, or let it be cut; too much is: "
                    + "'\(lost)'")
        }
        let more = pieces > 1 ? " (in pieces there is room for \(room * pieces))" : ""
        return "the prompt was cut after \(room) tokens\(more); lost: '\(lost)'"
    }

    private func padded(_ tokens: Tokens, _ pieces: Int) throws -> Tokens {
        let missing = pieces - tokens.ids.count
        guard missing > 0 else { return tokens }
        let empty = try tokenizer.encode("")
        let fill = { (rows: [[Int]]) in Array((0..<missing).map { _ in rows }.joined()) }
        return Tokens(
            ids: tokens.ids + fill(empty.ids),
            weights: tokens.weights + (0..<missing).flatMap { _ in empty.weights }, lost: tokens.lost)
    }

    private func encode(_ text: String, _ tokens: Tokens) async throws -> Tensor {
        let encoder = try await models.model("text_encoder")
        let name = Self.outputs.first { encoder.model.outputs[$0] != nil } ?? Self.outputs[0]
        var rows: [Tensor] = []
        for ids in tokens.ids {
            let input = Tensor(shape: [1, ids.count], values: ids.map(Float.init))
            rows.append(try await encoder.one(name, ["input_ids": input]))
        }
        var states = Tensor.concatenated(rows)
        guard states.shape.count == 3 else {
            throw DiffusionError.package("text_encoder: \(name) has shape \(states.shape), expected three dimensions")
        }
        if tokens.isWeighted { states = weighted(states, tokens) }
        if manifest.zerosForEmptyPrompt && text.isEmpty { states = Tensor(repeating: 0, shape: states.shape) }
        let (count, width) = (states.shape[0] * states.shape[1], states.shape[2])
        var turned = [Float](repeating: 0, count: count * width)
        for token in 0..<count {
            for feature in 0..<width { turned[feature * count + token] = states.values[token * width + feature] }
        }
        return Tensor(shape: [1, width, 1, count], values: turned)
    }

    /// States times their token's weight, scaled back to the mean that they had.
    private func weighted(_ states: Tensor, _ tokens: Tokens) -> Tensor {
        let width = states.shape[2]
        let weights = tokens.weights.flatMap { $0 }
        var values = states.values
        for (token, weight) in weights.enumerated() {
            for index in token * width..<(token + 1) * width { values[index] *= weight }
        }
        let mean = { (numbers: [Float]) in numbers.reduce(0.0) { $0 + Double($1) } }
        let factor = Float(mean(states.values) / mean(values))
        return Tensor(shape: states.shape, values: values.map { $0 * factor })
    }
}
