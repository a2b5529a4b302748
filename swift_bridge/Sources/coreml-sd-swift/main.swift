import DiffusionBridge
import Foundation

let help = """
    Draw pictures with converted models.

      coreml-sd-swift generate MODELS --prompt TEXT -o FILE.png
      coreml-sd-swift inspect MODELS

    Options of generate, as of the Python command:
      --prompt TEXT            what to draw
      --prompts-file FILE      one prompt per line, instead of --prompt
      -o, --output FILE.png    several pictures become NAME-1.png, NAME-2.png, …
      --negative-prompt TEXT   what not to draw
      --steps N                denoising steps (diffusers' for the models, mostly 50)
      --guidance-scale N       how closely to follow the prompt; 1 or less: off (diffusers' for the models, mostly 7.5)
      --seed N                 same seed, same picture (random, printed)
      --rng NAME               torch, numpy or nvidia (torch)
      --scheduler NAME         pndm, ddim, euler, … (the checkpoint's)
      --eta N                  fresh noise in each step of ddim, 0 to 1 (0)
      --count N                pictures per prompt, with seeds counting up (1)
      --image FILE.png         picture to start from, paint in or enlarge
      --strength N             how much of --image may change, above 0 to 1 (0.8; 1 with --mask)
      --mask FILE.png          white where --image is painted anew
      --depth-image FILE.png   depth of --image, brighter is nearer
      --noise-level N          upscaling: noise put on --image, 0 to 350 (20)
      --refiner-start N        SDXL with a refiner: the part of the steps after which it goes on, as 0.8 (never)
      --from FILE.png          repeat a picture of this or the Python program; other options override
      --preview                keep NAME-preview.png up to date while working
      --compute-units NAME     all, cpu-and-gpu, cpu-and-ne or cpu-only (the models')
      --tokenizer FOLDER       vocab.json and merges.txt, where the models have none
      --prediction-type NAME   models without manifest: epsilon, v_prediction or sample
      --latent-scale N         models without manifest: the VAE's scaling factor
      --long-prompt            refuse a prompt that is too long for the models, rather than cut it
      --reduce-memory          load and free models stage by stage
      --memory-budget BYTES    the same where all models together are larger
      --prewarm                load and run all models once before the first picture
      --no-safety              do not use the safety checker
      --timings                say how long each model took
    """

/// A line for the user beside the pictures' names, which alone go to standard output.
func say(_ line: String) {
    FileHandle.standardError.write(Data((line + "\n").utf8))
}

/// The exit code of a command, 0 when all went well.
func run(_ words: [String]) async -> Int32 {
    do {
        switch words.first {
        case "generate": try await GenerateCommand(Array(words.dropFirst())).run()
        case "inspect": try await inspect(Array(words.dropFirst()))
        case nil, "--help", "help": print(help)
        case let word?:
            throw DiffusionError(.input, "unknown command \(word): expected generate or inspect")
        }
        return 0
    } catch where error is CancellationError || Task.isCancelled {
        return interrupted
    } catch {
        say("error: \(error)")
        return 2
    }
}

/// What shells call a program that was stopped by Ctrl-C.
let interrupted: Int32 = 130
let work = Task { await run(Array(CommandLine.arguments.dropFirst())) }
// Files are written whole, so that at the second Ctrl-C nothing can be left half-written either.
signal(SIGINT, SIG_IGN)
let interrupts = DispatchSource.makeSignalSource(signal: SIGINT, queue: .global())
interrupts.setEventHandler {
    if work.isCancelled { exit(interrupted) }
    work.cancel()
}
interrupts.resume()
exit(await work.value)
