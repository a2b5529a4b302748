import DiffusionBridge
import Foundation

/// The words of a command line: `--name value`, `--name=value`, flags, and the rest in order.
struct Arguments {
    private var values: [String: String] = [:]
    private(set) var flags: Set<String> = []
    private(set) var positional: [String] = []

    /// Throws for an option that is not known, one without its value, and one given twice.
    init(_ words: [String], options: Set<String>, flags known: Set<String>) throws {
        var rest = words[...]
        while let word = rest.popFirst() {
            let name = word == "-o" ? "--output" : String(word.prefix { $0 != "=" })
            if known.contains(word) {
                flags.insert(word)
            } else if options.contains(name) {
                let value = word.contains("=") ? String(word.drop { $0 != "=" }.dropFirst()) : rest.popFirst()
                guard let value else { throw DiffusionError(.input, "\(name): no value follows it") }
                guard values.updateValue(value, forKey: name) == nil else {
                    throw DiffusionError(.input, "\(name) is given twice")
                }
            } else if word.hasPrefix("-") {
                let all = options.union(known).sorted().joined(separator: ", ")
                throw DiffusionError(.input, "unknown option \(word): expected one of \(all)")
            } else {
                positional.append(word)
            }
        }
    }

    func text(_ name: String) -> String? { values[name] }

    func number<Value: LosslessStringConvertible>(_ name: String, _ expected: String) throws -> Value? {
        guard let text = values[name] else { return nil }
        guard let value = Value(text) else { throw DiffusionError(.input, "\(name) \(text): expected \(expected)") }
        return value
    }

    func path(_ name: String) -> URL? { values[name].map { URL(fileURLWithPath: $0) } }
}
