/// The schedulers by the names that people know them by, which are the Python command's.
public enum SchedulerKind: String, Sendable, CaseIterable {
    case pndm
    case ddim
    case lms
    case lmsKarras = "lms karras"
    case euler
    case eulerKarras = "euler karras"
    case eulerAncestral = "euler-ancestral"
    case heun
    case heunKarras = "heun karras"
    case dpmPlusPlus2M = "dpm++ 2m"
    case dpmPlusPlus2MKarras = "dpm++ 2m karras"
    case dpmPlusPlus2MSDE = "dpm++ 2m sde"
    case dpmPlusPlus2MSDEKarras = "dpm++ 2m sde karras"
    case dpmPlusPlusSDE = "dpm++ sde"
    case dpmPlusPlusSDEKarras = "dpm++ sde karras"
    case unipc
    case lcm

    /// The scheduler of a name, whatever its case and separators. Throws for an unknown one.
    public init(named name: String) throws {
        guard let kind = Self.allCases.first(where: { Self.letters($0.rawValue) == Self.letters(name) }) else {
            throw DiffusionError.input("unknown scheduler '\(name)': expected one of \(Self.known)")
        }
        self = kind
    }

    static var known: String { allCases.map(\.rawValue).joined(separator: ", ") }

    private static func letters(_ name: String) -> [Substring] {
        name.lowercased().split { $0 == "_" || $0 == "-" || $0.isWhitespace }
    }

    /// The class of diffusers, and what is set on top of the checkpoint's own configuration.
    private var recipe: (className: String, settings: [String: JSON]) {
        let karras: [String: JSON] = ["use_karras_sigmas": .bool(true)]
        let second: [String: JSON] = ["algorithm_type": .string("dpmsolver++"), "solver_order": .integer(2)]
        let stochastic: [String: JSON] = ["algorithm_type": .string("sde-dpmsolver++"), "solver_order": .integer(2)]
        let single = stochastic.merging(["lower_order_final": .bool(true)]) { $1 }
        let both = { (settings: [String: JSON]) in settings.merging(karras) { $1 } }
        switch self {
        case .pndm: return ("PNDMScheduler", ["skip_prk_steps": .bool(true)])
        case .ddim: return ("DDIMScheduler", [:])
        case .lms: return ("LMSDiscreteScheduler", [:])
        case .lmsKarras: return ("LMSDiscreteScheduler", karras)
        case .euler: return ("EulerDiscreteScheduler", [:])
        case .eulerKarras: return ("EulerDiscreteScheduler", karras)
        case .eulerAncestral: return ("EulerAncestralDiscreteScheduler", [:])
        case .heun: return ("HeunDiscreteScheduler", [:])
        case .heunKarras: return ("HeunDiscreteScheduler", karras)
        case .dpmPlusPlus2M: return ("DPMSolverMultistepScheduler", second)
        case .dpmPlusPlus2MKarras: return ("DPMSolverMultistepScheduler", both(second))
        case .dpmPlusPlus2MSDE: return ("DPMSolverMultistepScheduler", stochastic)
        case .dpmPlusPlus2MSDEKarras: return ("DPMSolverMultistepScheduler", both(stochastic))
        case .dpmPlusPlusSDE: return ("DPMSolverSinglestepScheduler", single)
        case .dpmPlusPlusSDEKarras: return ("DPMSolverSinglestepScheduler", both(single))
        case .unipc: return ("UniPCMultistepScheduler", [:])
        case .lcm: return ("LCMScheduler", [:])
        }
    }

    /// A checkpoint's configuration for this scheduler.
    func applied(to configuration: SchedulerConfiguration) -> SchedulerConfiguration {
        let (className, settings) = recipe
        let off = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
        var changed = Dictionary(uniqueKeysWithValues: off.map { ($0, JSON.bool(false)) })
        changed["_class_name"] = .string(className)
        return configuration.setting(changed.merging(settings) { $1 })
    }

    /// The name that a configuration would be asked for by, nil where none fits.
    static func named(_ configuration: SchedulerConfiguration) -> SchedulerKind? {
        allCases.last { kind in
            let (className, settings) = kind.recipe
            let wanted = ["use_karras_sigmas": JSON.bool(false)].merging(settings) { $1 }
            return className == configuration.className && wanted.allSatisfy { configuration.holds($0.key, $0.value) }
        }
    }
}

extension SchedulerConfiguration {
    /// Whether a setting has a value, be it by default.
    func holds(_ key: String, _ value: JSON) -> Bool {
        let defaults: [String: JSON] = [
            "use_karras_sigmas": .bool(false), "algorithm_type": .string("dpmsolver++"), "solver_order": .integer(2),
            "skip_prk_steps": .bool(false), "lower_order_final": .bool(className.contains("Multistep")),
        ]
        return (self[key] ?? defaults[key]) == value
    }

    /// The scheduler of this configuration with its steps set. Throws where it cannot take so many, or where it is of
    /// a kind that is not known here.
    func scheduler(steps: Int, eta: Double = 0) throws -> any Scheduler {
        let most = try integer("num_train_timesteps", 1000)
        guard (1...max(most, 1)).contains(steps) else { throw DiffusionError.input("\(steps) steps: expected 1 to \(most)") }
        let made = try made(steps: steps, eta: eta)
        let levels = (made as? any SolverScheduler)?.levels ?? []
        let standsStill = zip(levels, levels.dropFirst()).contains { $0 == $1 }
        if standsStill || (made.timesteps.max() ?? 0) > Double(made.table.count - 1) {
            let name = SchedulerKind.named(self)?.rawValue ?? className
            throw DiffusionError.input("scheduler \(name) cannot take as many as \(steps) steps: use fewer")
        }
        return made
    }

    private func made(steps: Int, eta: Double) throws -> any Scheduler {
        switch className {
        case "PNDMScheduler": return try PNDM(self, steps: steps)
        case "DDIMScheduler": return try DDIM(self, steps: steps, eta: eta)
        case "LMSDiscreteScheduler": return try LMS(self, steps: steps)
        case "EulerDiscreteScheduler": return try Euler(self, steps: steps)
        case "EulerAncestralDiscreteScheduler": return try EulerAncestral(self, steps: steps)
        case "HeunDiscreteScheduler": return try Heun(self, steps: steps)
        case "DPMSolverMultistepScheduler": return try DPMSolverMultistep(self, steps: steps)
        case "DPMSolverSinglestepScheduler": return try DPMSolverSinglestep(self, steps: steps)
        case "UniPCMultistepScheduler": return try UniPC(self, steps: steps)
        case "LCMScheduler": return try LCM(self, steps: steps)
        default:
            throw DiffusionError.input(
                "the models ask for the scheduler class '\(className)', which the Swift program does not have: choose "
                    + "one of \(SchedulerKind.known)")
        }
    }
}
