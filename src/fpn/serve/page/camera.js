// The webcam: frames as JPEG files, one at a time.

const WANTED = { width: { ideal: 1280 }, height: { ideal: 720 }, facingMode: { ideal: "environment" } };

/** Starts the camera in a <video>; gives `frame()`, a JPEG of what it sees now, and `stop()`. Errors are sentences. */
export async function start(video, onEnd) {
  if (!navigator.mediaDevices?.getUserMedia)
    throw new Error("Browsers allow the camera on https and on localhost only, and this page is neither.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: WANTED, audio: false });
  } catch (error) {
    throw new Error(why(error));
  }
  const stop = () => {
    stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  };
  try {
    stream.getVideoTracks()[0].addEventListener("ended", onEnd); // pulled out, or its permission taken back
    video.srcObject = stream;
    await video.play();
  } catch (error) {
    stop();
    throw new Error(why(error));
  }
  const canvas = document.createElement("canvas");
  const frame = () => {
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
  };
  return { frame, stop };
}

function why(error) {
  if (error.name === "NotAllowedError") return "The camera is not allowed on this page. The browser's address bar can change that.";
  if (error.name === "NotFoundError") return "No camera was found.";
  if (error.name === "NotReadableError") return "Another program is using the camera.";
  return `The camera did not start: ${error.message}`;
}
