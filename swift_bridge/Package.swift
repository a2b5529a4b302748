// swift-tools-version: 6.0
import PackageDescription

// Systems without Core ML get a module of that name, whose models a Python child process runs. Nothing of it is
// built on Apple's systems.
#if canImport(CoreML)
    let standIn: [Target] = []
    let coreML: [Target.Dependency] = []
#else
    let standIn: [Target] = [
        .target(name: "CoreML"),
        .testTarget(name: "CoreMLTests", dependencies: ["CoreML"]),
    ]
    let coreML: [Target.Dependency] = ["CoreML"]
#endif

let package = Package(
    name: "DiffusionBridge",
    platforms: [.macOS(.v13), .iOS(.v16)],
    products: [
        .library(name: "DiffusionBridge", targets: ["DiffusionBridge"]),
        // What an app does with it. A product, so that Xcode has a scheme to compile it for iOS with.
        .library(name: "Example", targets: ["Example"]),
        .executable(name: "coreml-sd-swift", targets: ["coreml-sd-swift"]),
    ],
    targets: [
        .target(name: "DiffusionBridge", dependencies: coreML),
        .executableTarget(name: "coreml-sd-swift", dependencies: ["DiffusionBridge"]),
        .target(name: "Example", dependencies: ["DiffusionBridge"]),
        .testTarget(
            name: "DiffusionBridgeTests", dependencies: ["DiffusionBridge"] + coreML, resources: [.copy("Golden")]),
    ] + standIn,
    swiftLanguageModes: [.v6]
)
