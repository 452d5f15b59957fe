#!lua name=inferpipe_sessions_v1
-- Sessions and the line of their turns. The keys stand at the top of redis_functions.lua; all of one
-- session are of its partition's slot. Times are the server's own, so ingresses need not agree.

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function key_of(keys, args)
  return keys[1] .. ':se:' .. args[1]
end

local function touch(k, idle_ms)
  for _, suffix in ipairs({'', ':m', ':line', ':held'}) do
    redis.call('PEXPIRE', k .. suffix, idle_ms)
  end
end

local function step_out(k, turn)
  redis.call('ZREM', k .. ':line', turn)
  redis.call('ZREM', k .. ':held', turn)
end

-- Take out of the line whose process has died: its lease has run out.
local function drop_dead(k, now)
  for _, turn in ipairs(redis.call('ZRANGEBYSCORE', k .. ':held', '-inf', string.format('%.0f', now))) do
    step_out(k, turn)
  end
end

local function place(k, turn, now, lease_ms, idle_ms)
  redis.call('ZADD', k .. ':held', string.format('%.0f', now + tonumber(lease_ms)), turn)
  touch(k, idle_ms)
  return redis.call('ZRANK', k .. ':line', turn) == 0 and 'running' or 'waiting'
end

-- session_create: session idle_ms (name value)*
local function session_create(keys, args)
  local k = key_of(keys, args)
  redis.call('HSET', k, unpack(args, 3))
  return redis.call('PEXPIRE', k, args[2])
end

-- session_end: session -> 1 when it was there
local function session_end(keys, args)
  local k = key_of(keys, args)
  local was_there = redis.call('DEL', k)
  redis.call('DEL', k .. ':m', k .. ':line', k .. ':held')
  return was_there
end

-- session_join: session turn lease_ms idle_ms waiting_max -> 'running' | 'waiting' | 'full' | 'ended'
local function session_join(keys, args)
  local k, turn, now = key_of(keys, args), args[2], now_ms()
  if redis.call('EXISTS', k) == 0 then return 'ended' end
  drop_dead(k, now)
  if not redis.call('ZSCORE', k .. ':line', turn) then
    if redis.call('ZCARD', k .. ':line') > tonumber(args[5]) then return 'full' end
    redis.call('ZADD', k .. ':line', redis.call('HINCRBY', k, 'order', 1), turn)
  end
  return place(k, turn, now, args[3], args[4])
end

-- session_hold: session turn lease_ms idle_ms -> 'running' | 'waiting' | 'lost' | 'ended'
local function session_hold(keys, args)
  local k, turn, now = key_of(keys, args), args[2], now_ms()
  if redis.call('EXISTS', k) == 0 then return 'ended' end
  if redis.call('HGET', k, 'last') == turn then return 'running' end  -- kept a moment ago
  drop_dead(k, now)
  if not redis.call('ZSCORE', k .. ':line', turn) then return 'lost' end
  return place(k, turn, now, args[3], args[4])
end

-- session_leave: session turn
local function session_leave(keys, args)
  step_out(key_of(keys, args), args[2])
  return 1
end

-- session_keep: session turn idle_ms used_ms bytes message* -> 'running' | 'lost' | 'ended'
local function session_keep(keys, args)
  local k, turn = key_of(keys, args), args[2]
  if redis.call('EXISTS', k) == 0 then return 'ended' end
  if redis.call('HGET', k, 'last') == turn then return 'running' end
  drop_dead(k, now_ms())
  if redis.call('ZRANK', k .. ':line', turn) ~= 0 then return 'lost' end
  redis.call('RPUSH', k .. ':m', unpack(args, 6))
  redis.call('HINCRBY', k, 'count', #args - 5)
  redis.call('HINCRBY', k, 'bytes', args[5])
  redis.call('HSET', k, 'last', turn, 'used', args[4])
  step_out(k, turn)
  touch(k, args[3])
  return 'running'
end

redis.register_function('ip1_session_create', session_create)
redis.register_function('ip1_session_end', session_end)
redis.register_function('ip1_session_join', session_join)
redis.register_function('ip1_session_hold', session_hold)
redis.register_function('ip1_session_leave', session_leave)
redis.register_function('ip1_session_keep', session_keep)
