import Foundation

/// An error that a user can act on: what, where, got, expected and what to do, in one line.
public struct DiffusionError: Error, Sendable, Equatable, CustomStringConvertible, LocalizedError {
    /// What is at fault.
    public enum Kind: String, Sendable {
        /// What the caller asked for or gave cannot be used.
        case input
        /// A model, manifest or folder is damaged or not what it claims to be.
        case package
        /// A model computed values that are not numbers, or Core ML failed.
        case model
        /// The system lacks something that is needed.
        case installation
        /// A file cannot be read or written.
        case storage
    }

    /// What is at fault.
    public let kind: Kind
    /// One line for the user.
    public let message: String

    /// An error with a message of one line.
    public init(_ kind: Kind, _ message: String) {
        self.kind = kind
        self.message = message
    }

    public var description: String { message }
    public var errorDescription: String? { message }

    static func input(_ message: String) -> DiffusionError { DiffusionError(.input, message) }
    static func package(_ message: String) -> DiffusionError { DiffusionError(.package, message) }
    static func storage(_ message: String) -> DiffusionError { DiffusionError(.storage, message) }

    /// A model that computes NaN or infinity, which would make a black picture.
    static func notFinite(_ model: String) -> DiffusionError {
        DiffusionError(
            .model,
            "\(model) gave values that are not numbers (NaN or infinity): its weights are damaged or it overflows in "
                + "float16; check it with `coreml-sd inspect`, or convert it again with --precision auto")
    }
}
