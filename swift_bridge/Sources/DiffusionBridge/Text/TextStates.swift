/// Texts as the UNet takes them.
struct EncodedTexts {
    /// (texts, width, 1, length); of several encoders side by side.
    let states: Tensor
    /// The last encoder's state of the whole text, (texts, width), where it gives one.
    let pooled: Tensor?
    /// What was cut.
    let notes: [String]
}

/// Prompts to the states that the UNet attends to.
///
/// A prompt that is too long for the encoder is encoded in as many pieces as the UNet takes, each with its own start and
/// end, set one after the other. What is too long even so is cut, or refused with `isStrict`.
struct TextStates {
    static let encoders = ["text_encoder", "text_encoder_2"]
    private static let outputs = ["last_hidden_state", "hidden_embeds"]
    let models: Models
    /// The names of the text encoders, in order.
    let names: [String]
    /// One for each of them.
    let tokenizers: [Tokenizer]
    /// How many tokens an encoder knows, by its name, as far as that is known.
    let vocabularySizes: [String: Int]
    let zerosForMissing: Bool
    /// How many text tokens the UNet takes.
    let length: Int
    let isStrict: Bool

    /// Each distinct text is encoded once. Nil is a text that was not given: it is zero where the checkpoint wants that
    /// (SDXL's), else empty. An empty text is encoded as any other.
    func encode(_ texts: [String?]) async throws -> EncodedTexts {
        var distinct: [String?] = []
        for text in texts where !distinct.contains(text) { distinct.append(text) }
        var columns = [[Float]](repeating: [], count: distinct.count)
        var pooled: [Tensor?] = []
        var notes: [String] = []
        for (name, tokenizer) in zip(names.isEmpty ? [Self.encoders[0]] : names, tokenizers) {
            let pieces = try self.pieces(tokenizer)
            pooled = []
            for (index, text) in distinct.enumerated() {
                let tokens = try tokenizer.encode(text ?? "", pieces: pieces)
                if !tokens.lost.isEmpty {
                    let note = try self.note(tokens, tokenizer, pieces)
                    if !notes.contains(note) { notes.append(note) }
                }
                try check(tokens, name, tokenizer)
                let (states, whole) = try await encode(name, tokens)
                columns[index] += states
                pooled.append(whole)
            }
            await models.release(name)
        }
        let width = (columns.first?.count ?? 0) / length
        var rows = columns.map { Tensor(shape: [1, width, 1, length], values: $0) }
        var wholes = pooled.compactMap { $0 }
        if zerosForMissing, let missing = distinct.firstIndex(of: nil) {
            rows[missing] = Tensor(repeating: 0, shape: rows[missing].shape)
            if !wholes.isEmpty { wholes[missing] = Tensor(repeating: 0, shape: wholes[missing].shape) }
        }
        let places = texts.compactMap { distinct.firstIndex(of: $0) }
        return EncodedTexts(
            states: Tensor.concatenated(places.map { rows[$0] }),
            pooled: wholes.isEmpty ? nil : Tensor.concatenated(places.map { wholes[$0] }), notes: notes)
    }

    /// An embedding that ends before a token's number gives what happens to be there, or zeros.
    private func check(_ tokens: Tokens, _ name: String, _ tokenizer: Tokenizer) throws {
        guard let size = vocabularySizes[name], let unknown = tokens.ids.joined().filter({ $0 >= size }).min() else {
            return
        }
        throw DiffusionError.input(
            "the tokenizer gives '\(tokenizer.name(of: unknown))' the number \(unknown), but the \(name) knows \(size) "
                + "tokens only: leave it out of the prompt, or name the tokenizer that belongs to these models")
    }

    private func pieces(_ tokenizer: Tokenizer) throws -> Int {
        guard length >= tokenizer.length, length % tokenizer.length == 0 else {
            throw DiffusionError.input(
                "unet: takes \(length) text tokens, no multiple of the encoder's \(tokenizer.length)")
        }
        return length / tokenizer.length
    }

    private func note(_ tokens: Tokens, _ tokenizer: Tokenizer, _ pieces: Int) throws -> String {
        let room = (tokenizer.length - 2) * pieces
        let lost = tokens.lost.count <= 300 ? tokens.lost : tokens.lost.prefix(300) + "…"
        guard isStrict else { return "the prompt was cut after \(room) tokens; lost: '\(lost)'" }
        throw DiffusionError.input(
            "the prompt is longer than the \(room) tokens that this UNet has room for (it takes "
                + "\(pieces * tokenizer.length) with starts and ends): shorten it, let it be cut, or convert with a "
                + "larger --context-length; too much is: '\(lost)'")
    }

    /// (width, length) states of a text's pieces, and the pooled state of the first one, (1, width).
    private func encode(_ name: String, _ tokens: Tokens) async throws -> ([Float], Tensor?) {
        let encoder = try await models.model(name)
        let output = Self.outputs.first { encoder.model.outputs[$0] != nil } ?? Self.outputs[0]
        var rows: [Tensor] = []
        var pooled: Tensor?
        for ids in tokens.ids {
            let input = Tensor(shape: [1, ids.count], values: ids.map { Float($0) })
            let results = try await encoder.predict(["input_ids": input])
            rows.append(try encoder.checked(output, results))
            guard rows.count == 1, encoder.model.outputs["pooled_outputs"] != nil else { continue }
            let whole = try encoder.checked("pooled_outputs", results)
            pooled = Tensor(shape: [1, whole.values.count], values: whole.values)
        }
        var states = Tensor.concatenated(rows)
        guard states.shape.count == 3 else {
            throw DiffusionError.package("\(name): \(output) has shape \(states.shape), expected three dimensions")
        }
        if tokens.isWeighted { states = weighted(states, tokens) }
        let (count, width) = (states.shape[0] * states.shape[1], states.shape[2])
        var turned = [Float](repeating: 0, count: count * width)
        for token in 0..<count {
            for feature in 0..<width { turned[feature * count + token] = states.values[token * width + feature] }
        }
        return (turned, pooled)
    }

    /// States times their token's weight, scaled back to the mean that they had.
    private func weighted(_ states: Tensor, _ tokens: Tokens) -> Tensor {
        let width = states.shape[2]
        let weights = tokens.weights.flatMap { $0 }
        var values = states.values
        for (token, weight) in weights.enumerated() {
            for index in token * width..<(token + 1) * width { values[index] *= weight }
        }
        let sum = { (numbers: [Float]) in numbers.reduce(0.0) { $0 + Double($1) } }
        let factor = Float(sum(states.values) / sum(values))
        return Tensor(shape: states.shape, values: values.map { $0 * factor })
    }
}
