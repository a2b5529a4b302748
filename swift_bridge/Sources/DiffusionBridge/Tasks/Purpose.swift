/// The kinds of drawing. Which one it is follows from the UNet's channels and from what the request has.
enum Purpose: String, CaseIterable {
    case textToImage = "text to image"
    case imageToImage = "image to image"
    case blending = "in-painting by blending"
    case inPainting = "in-painting"
    case depthToImage = "depth to image"
    case upscaling

    /// What a request may have that not every purpose can use, by the words of messages.
    enum Given: String, CaseIterable {
        case image = "an image"
        case mask = "a mask"
        case depth = "a depth"
        case strength = "a strength"
        case noiseLevel = "a noise level"
        case latents
        case denoisingStart = "a denoisingStart"
        case denoisingEnd = "a denoisingEnd"
        case refinerStart = "a refinerStart"
    }

    var channels: Int {
        switch self {
        case .textToImage, .imageToImage, .blending: 4
        case .inPainting: 9
        case .depthToImage: 5
        case .upscaling: 7
        }
    }

    var needs: Set<Given> {
        switch self {
        case .textToImage: []
        case .blending, .inPainting: [.image, .mask]
        case .imageToImage, .depthToImage, .upscaling: [.image]
        }
    }

    var takes: Set<Given> {
        switch self {
        case .textToImage: [.latents, .denoisingStart, .denoisingEnd, .refinerStart]
        case .imageToImage: [.strength, .denoisingStart, .denoisingEnd, .refinerStart]
        case .blending, .inPainting: [.strength]
        case .depthToImage: [.depth, .strength]
        case .upscaling: [.noiseLevel, .latents]
        }
    }

    private var description: String {
        switch self {
        case .textToImage: "a prompt alone"
        case .imageToImage: "an image, and a strength for how much of it may change"
        case .blending: "an image and a mask (white: paint anew), any models"
        case .inPainting: "an image and a mask (white: paint anew), models of an in-painting checkpoint"
        case .depthToImage: "an image, models of a depth checkpoint; a depth in place of the estimated one"
        case .upscaling: "an image (a quarter of the result's size), models of the x4 upscaler; a noise level"
        }
    }

    /// What diffusers' pipeline for this purpose imposes on every scheduler, beyond what the family's imposes.
    var schedulerSettings: [String: JSON] {
        self == .blending || self == .inPainting ? ["skip_prk_steps": .bool(true)] : [:]
    }

    /// The purpose of a request to a UNet with so many channels. Throws an error that names what is missing or cannot
    /// be used.
    init(channels: Int, _ request: Request) throws {
        let able = Self.allCases.filter { $0.channels == channels }
        guard !able.isEmpty else {
            throw DiffusionError.input(
                "the UNet takes \(channels) channels, and no task is known for that (known: 4, 5, 7, 9)")
        }
        let given = request.given
        guard let found = able.first(where: { $0.needs.isSubset(of: given) && given.isSubset(of: $0.needs.union($0.takes)) })
        else {
            let listed = Given.allCases.filter(given.contains).map(\.rawValue).joined(separator: " and ")
            let ways = able.map { "\($0.rawValue): \($0.description)" }.joined(separator: "; or ")
            throw DiffusionError.input("given \(listed.isEmpty ? "a prompt alone" : listed), but these models do \(ways)")
        }
        self = found
    }
}

extension Request {
    fileprivate var given: Set<Purpose.Given> {
        let there: [(Purpose.Given, Bool)] = [
            (.image, image != nil), (.mask, mask != nil), (.depth, depth != nil), (.strength, strength != nil),
            (.noiseLevel, noiseLevel != nil), (.latents, latents != nil), (.denoisingStart, denoisingStart != nil),
            (.denoisingEnd, denoisingEnd != nil), (.refinerStart, refinerStart != nil),
        ]
        return Set(there.filter(\.1).map(\.0))
    }
}
