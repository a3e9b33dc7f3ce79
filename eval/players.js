// The players of a comparison keep in step with the first; the stage below them shows two of them
// in one picture: a wipe, or the difference of their colours.
const parts = () => {
  const root = element.querySelector('.k-compare');
  if (!root) return null;
  const find = name => root.querySelector(name);
  return {
    root, fps: Number(root.dataset.fps), frames: Number(root.dataset.frames),
    videos: [...root.querySelectorAll('video')], canvas: find('canvas'), scrub: find('[name=frame]'),
    wipe: find('[name=wipe]'), other: find('[name=other]'), play: find('[data-play]'),
    difference: root.querySelector('[name=how][value=difference]').checked,
  };
};

const seek = (it, frame) => {
  for (const video of it.videos) {
    video.pause();
    video.currentTime = (frame + 0.5) / it.fps;
  }
};

element.addEventListener('click', event => {
  const it = parts();
  if (!it || !event.target.closest('[data-play]')) return;
  it.videos[0].paused ? it.videos[0].play() : it.videos[0].pause();
});

element.addEventListener('input', event => {
  const it = parts();
  if (it && event.target.name === 'frame') seek(it, Number(event.target.value));
});

element.addEventListener('pointermove', event => {
  const it = parts();
  if (!it || event.target !== it.canvas || it.difference) return;
  if (event.pointerType === 'mouse' || event.buttons) {
    const box = it.canvas.getBoundingClientRect();
    it.wipe.value = 100 * (event.clientX - box.left) / box.width;
  }
});

const follow = it => {
  const [first, ...others] = it.videos;
  for (const video of others) {
    if (video.readyState < 2) continue;
    if (video.paused !== first.paused) {
      first.paused ? video.pause() : video.play().catch(() => {});
    }
    const apart = Math.abs(video.currentTime - first.currentTime);
    if (apart > (first.paused ? 0.001 : 1 / it.fps) && !video.seeking) {
      video.currentTime = first.currentTime;
    }
  }
  it.play.textContent = first.paused ? 'Play' : 'Pause';
  const frame = Math.min(it.frames - 1, Math.floor(first.currentTime * it.fps));
  if (document.activeElement !== it.scrub || !first.paused) it.scrub.value = frame;
};

const draw = it => {
  const one = it.videos[0], other = it.videos[Number(it.other.value)];
  if (one.readyState < 2 || other.readyState < 2) return;
  const { canvas } = it;
  if (canvas.width !== one.videoWidth) canvas.width = one.videoWidth;
  if (canvas.height !== one.videoHeight) canvas.height = one.videoHeight;
  const ink = canvas.getContext('2d');
  ink.globalCompositeOperation = 'copy';
  ink.drawImage(one, 0, 0);
  if (it.difference) {
    ink.globalCompositeOperation = 'difference';
    ink.drawImage(other, 0, 0);
    ink.globalCompositeOperation = 'lighter'; // twice over: four times as bright
    ink.drawImage(canvas, 0, 0);
    ink.drawImage(canvas, 0, 0);
    return;
  }
  ink.globalCompositeOperation = 'source-over';
  const edge = Math.round(canvas.width * Number(it.wipe.value) / 100);
  const rest = canvas.width - edge;
  if (rest) ink.drawImage(other, edge, 0, rest, canvas.height, edge, 0, rest, canvas.height);
  ink.fillStyle = '#fff';
  if (edge && rest) ink.fillRect(edge - 1, 0, 1, canvas.height);
};

const turn = () => {
  const it = element.isConnected ? parts() : null;
  if (it && it.videos.length > 1 && it.root.offsetParent) {
    follow(it);
    draw(it);
  }
  requestAnimationFrame(turn);
};
requestAnimationFrame(turn);
